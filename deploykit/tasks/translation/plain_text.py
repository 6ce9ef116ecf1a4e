"""Make a checkpoint's tokenizer treat special tokens in a text as plain text, such as "</s>"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def read_as_text(tokenizer: Any) -> None:
    """Make ``>>code<<`` plain text for a Marian checkpoint of one pair; a multilingual one reads it at a text's
    beginning."""
    if hasattr(tokenizer, "remove_language_code") and not tokenizer.supported_language_codes:
        tokenizer.remove_language_code = lambda text: ([], text)


def splits_special(tokenizer: Any) -> bool:
    """Return whether the tokenizer can treat special tokens in a text as plain text.

    A slow tokenizer recognizes either all added tokens in a text or none. If a checkpoint has added tokens that are not
    special, it must recognize all.
    """
    return bool(tokenizer.is_fast) or all(token.special for token in tokenizer.added_tokens_decoder.values())


def token_ids(tokenizer: Any, texts: Sequence[str], *, side: str = "text", most: int | None = None) -> list[list[int]]:
    """Return token ids with special tokens, truncated to ``most``; ``side`` is "text" or "text_target"."""
    if not texts:
        return []  # the tokenizer does not accept an empty list
    encoded = tokenizer(
        **{side: list(texts)},
        truncation=most is not None,
        max_length=most,
        split_special_tokens=splits_special(tokenizer),
    )
    return [list(ids) for ids in encoded["input_ids"]]
