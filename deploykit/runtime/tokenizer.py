"""Tokenizing without transformers: the checkpoint's tokenizer.json through the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from deploykit.errors import ArtifactError


class TextTokenizer:
    """Token ids of texts, special tokens added, cut to ``max_length`` tokens on the side that the file says."""

    def __init__(self, path: Path, max_length: int) -> None:
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ArtifactError(f"{path}: is not a tokenizer: {error}", "copy the tokenizer again") from error
        self._tokenizer.no_padding()
        saved = self._tokenizer.truncation or {}
        self._tokenizer.enable_truncation(max_length, direction=saved.get("direction", "right"))

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts))]
