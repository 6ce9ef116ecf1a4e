"""Add noise to prompts. Answers stay unchanged, because the model learns them, and so do system messages and tools' results."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from deploykit.tasks.text_generation.rows import Row, content_text


def noisy_prompt(row: Row, noise: Callable[[str], str]) -> Row:
    """Return a row with noise in what the user writes. A plain text, which has no prompt, stays unchanged."""
    return dataclasses.replace(
        row,
        messages=tuple(
            {**message, "content": noise(content_text(message))} if message["role"] == "user" else message
            for message in row.messages
        ),
    )
