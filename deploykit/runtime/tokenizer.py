"""Tokenize without transformers: the checkpoint's tokenizer.json through the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from deploykit.errors import ArtifactError

_MARGIN = 16  # The tokens next to a cut may differ from those of the whole text.


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
        self._max_length, self._side = max_length, saved.get("direction", "right")
        self._whole = Tokenizer.from_str(self._tokenizer.to_str())
        self._whole.no_truncation()
        self._tokenizer.enable_truncation(max_length, direction=self._side)

    def encode(self, texts: Sequence[tuple[str, ...]]) -> Encoded:
        """Return the tokens of each text, or pair of texts."""
        most = self._max_length + _MARGIN
        asked = [
            tuple(shortened(self._whole, part, most, self._side) for part in text) if len(text) > 1 else text[0]
            for text in texts
        ]
        found = self._tokenizer.encode_batch_fast(asked)
        return Encoded([encoding.ids for encoding in found], [encoding.type_ids for encoding in found])


def shortened(whole: Tokenizer, text: str, most: int, side: str) -> str:
    """Cut one text of a pair to ``most`` tokens of ``whole``, a tokenizer that does not truncate; ``side`` is the end
    that truncation drops. The time that truncation takes is quadratic in the lengths of a pair."""
    if len(text) <= most:
        return text
    offsets = whole.encode(text, add_special_tokens=False).offsets
    if len(offsets) <= most:
        return text
    return text[: offsets[most - 1][1]] if side == "right" else text[offsets[-most][0] :]
