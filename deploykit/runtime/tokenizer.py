"""Tokenize without transformers: the checkpoint's tokenizer.json through the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from deploykit.errors import ArtifactError


class TextTokenizer:
    """A tokenizer that adds special tokens and truncates texts to ``max_length`` tokens, on the side that the file
    says.

    Raises ArtifactError if ``path`` is not a tokenizer.
    """

    def __init__(self, path: Path, max_length: int) -> None:
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ArtifactError(
                f"{path}: is not a tokenizer: {error}", "copy the file again, or export the model again"
            ) from error
        self._tokenizer.no_padding()
        saved = self._tokenizer.truncation or {}
        self._tokenizer.enable_truncation(max_length, direction=saved.get("direction", "right"))

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts))]
