"""Define the result of a translation, common to all engines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from deploykit.runtime.generation import Generation

Finish = Literal["eos", "length"]


@dataclass(frozen=True)
class Translated:
    """One translated text.

    ``score`` is the sum of the tokens' log-probabilities (forced tokens count 0) divided by
    ``target_tokens ** length_penalty``, as Hugging Face's ``sequences_scores``: the mean log-probability for greedy
    search with a length penalty of 1. ``target_tokens`` counts the end token, not the start token. ``finish`` is
    "length" if the length limit ended it.
    """

    text: str
    score: float
    source_tokens: int
    target_tokens: int
    finish: Finish


EMPTY = Translated("", 0.0, 0, 0, "eos")
"""The translation of a blank text."""


def finish_of(target_ids: Sequence[int], generation: Generation, eos_token_ids: Sequence[int]) -> Finish:
    """Return why decoding ended; ``target_ids`` do not include the start token.

    An end token that ``forced_eos_token_id`` put at the length limit does not count as the text's end.
    """
    at_limit = len(target_ids) + 1 >= generation.max_length
    ended = bool(target_ids) and target_ids[-1] in eos_token_ids
    return "length" if not ended or (at_limit and generation.forced_eos_token_id is not None) else "eos"
