"""Choose the best of several answers to a prompt, as OpenAI's ``best_of`` does: the likeliest per token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deploykit.tasks.text_generation.generator import Generated


def likeliest(answers: Sequence[Generated], n: int) -> list[Generated]:
    """Return all ``n`` answers as they are, or of more the ``n`` of the highest mean log-probability, best first."""
    if len(answers) <= n:
        return list(answers)
    return sorted(answers, key=_mean, reverse=True)[:n]


def _mean(answer: Generated) -> float:
    return sum(answer.logprobs) / len(answer.logprobs)
