"""Add noise to questions. Contexts stay unchanged, because answers are parts of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from deploykit.tasks.question_answering.rows import Example


def noisy_question(example: Example, noise: Callable[[str], str]) -> Example:
    """Return an example with noise in its question."""
    return dataclasses.replace(example, question=noise(example.question))
