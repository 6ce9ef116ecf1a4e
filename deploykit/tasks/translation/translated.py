"""What a translation is, whichever engine made it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from deploykit.runtime.generation import Generation

Finish = Literal["eos", "length"]


@dataclass(frozen=True)
class Translated:
    """One translated text.

    ``score`` is the sum of its tokens' log-probabilities (forced tokens count 0) divided by
    ``target_tokens ** length_penalty``, as Hugging Face's ``sequences_scores``; for greedy search
    with a length penalty of 1 that is the mean log-probability. ``target_tokens`` counts the end
    token, not the start token. ``finish`` is "length" when the length limit ended it.
    """

    text: str
    score: float
    source_tokens: int
    target_tokens: int
    finish: Finish


EMPTY = Translated("", 0.0, 0, 0, "eos")
"""The translation of a text that is empty or white space alone."""


def finish_of(target_ids: Sequence[int], generation: Generation, eos_token_ids: Sequence[int]) -> Finish:
    """Why decoding ended; ``target_ids`` are without the start token.

    An end token that stands where ``forced_eos_token_id`` puts one says nothing about the text.
    """
    at_limit = len(target_ids) + 1 >= generation.max_length
    ended = bool(target_ids) and target_ids[-1] in eos_token_ids
    return "length" if not ended or (at_limit and generation.forced_eos_token_id is not None) else "eos"
