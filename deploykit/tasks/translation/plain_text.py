"""Have a checkpoint's tokenizer read a text as text: "</s>" in it is five characters, and ends nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def read_as_text(tokenizer: Any) -> None:
    """Make ``>>code<<`` text in a Marian checkpoint of one pair; in one of many targets it is read where a text begins."""
    if hasattr(tokenizer, "remove_language_code") and not tokenizer.supported_language_codes:
        tokenizer.remove_language_code = lambda text: ([], text)


def splits_special(tokenizer: Any) -> bool:
    """Whether special tokens in a text are text.

    A tokenizer in Python can only read all added tokens in a text or none: where a checkpoint has added tokens that are
    not special, it reads all.
    """
    return bool(tokenizer.is_fast) or all(token.special for token in tokenizer.added_tokens_decoder.values())


def token_ids(tokenizer: Any, texts: Sequence[str], *, side: str = "text", most: int | None = None) -> list[list[int]]:
    """Return ids with special tokens; ``side`` is "text" or "text_target", ``most`` tokens are kept of each text."""
    if not texts:
        return []  # which the tokenizer does not take
    encoded = tokenizer(
        **{side: list(texts)},
        truncation=most is not None,
        max_length=most,
        split_special_tokens=splits_special(tokenizer),
    )
    return [list(ids) for ids in encoded["input_ids"]]
