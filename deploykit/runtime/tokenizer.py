"""Tokenize without transformers: the checkpoint's tokenizer.json through the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from deploykit.errors import ArtifactError


@dataclass(frozen=True)
class Encoded:
    """Token ids of texts, unpadded, and the types of the tokens: 1 for those of a pair's second text."""

    ids: list[list[int]]
    types: list[list[int]]


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

    def encode(self, texts: Sequence[tuple[str, ...]]) -> Encoded:
        """Return the tokens of each text, or pair of texts."""
        found = self._tokenizer.encode_batch_fast([text if len(text) > 1 else text[0] for text in texts])
        return Encoded([encoding.ids for encoding in found], [encoding.type_ids for encoding in found])
