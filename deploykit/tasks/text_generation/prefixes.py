"""Keep the caches of prompt prefixes, so that shared prefixes are computed once."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from deploykit.runtime.engines.causal_lm import CausalLm

PREFIX_BLOCK = 32
"""Tokens that are stored and found together."""


class Prefixes:
    """Caches of prompt prefixes, by blocks of tokens; the least recently used make room for new ones."""

    def __init__(self, most_tokens: int) -> None:
        self.most_tokens = most_tokens // PREFIX_BLOCK * PREFIX_BLOCK
        self._blocks: OrderedDict[bytes, Any] = OrderedDict()

    def restore(self, model: CausalLm, prompt: Sequence[int]) -> int:
        """Put the known prefix of ``prompt`` into the prompt area. Returns the number of its tokens.

        At least two tokens are left to read.
        """
        read = 0
        for end, key in _keys(prompt[: max(0, len(prompt) - 2)]):
            if key not in self._blocks:
                break
            self._blocks.move_to_end(key)
            model.restore(self._blocks[key])
            read = end
        return read

    def learns(self, prompt: Sequence[int], others: Sequence[Sequence[int]]) -> bool:
        """Return whether a longer prefix of ``prompt`` will be known when one of ``others`` is stored."""
        if not others:
            return False
        for end, key in _keys(prompt[: min(max(0, len(prompt) - 2), self.most_tokens)]):
            if key not in self._blocks:
                return any(list(prompt[:end]) == list(other[:end]) for other in others)
        return False

    def store(self, model: CausalLm, prompt: Sequence[int]) -> None:
        """Store the contents of the prompt area, the caches of ``prompt``."""
        for end, key in _keys(prompt[: self.most_tokens]):
            if key in self._blocks:
                self._blocks.move_to_end(key)
                continue
            while (len(self._blocks) + 1) * PREFIX_BLOCK > self.most_tokens:
                self._blocks.popitem(last=False)
            self._blocks[key] = model.saved(end - PREFIX_BLOCK, end)


def _keys(prompt: Sequence[int]) -> Iterator[tuple[int, bytes]]:
    """Yield the end of each whole block of ``prompt``, and a key of all tokens up to there."""
    digest = hashlib.blake2b(digest_size=16)
    for start in range(0, len(prompt) - PREFIX_BLOCK + 1, PREFIX_BLOCK):
        digest.update(np.array(prompt[start : start + PREFIX_BLOCK], np.int64).tobytes())
        yield start + PREFIX_BLOCK, digest.digest()
