"""Answer rows together; a refused row does not affect the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from deploykit.errors import DataError, RequestError

Asked = TypeVar("Asked")
Found = TypeVar("Found")
Refusal = DataError | RequestError


def answer_each(answer: Callable[[Sequence[Asked]], Iterable[Found]], asked: Sequence[Asked]) -> list[Found | Refusal]:
    """Return what ``answer`` gives for each of ``asked``, in their order, or the error with which it refuses that one.

    All rows are answered in one call. If it is refused, each half is tried separately. Raises RequestError for a server that fails.
    """
    if not asked:
        return []
    try:
        return list(answer(asked))
    except (DataError, RequestError) as error:
        if isinstance(error, RequestError) and error.status != 400:
            raise
        if len(asked) == 1:
            return [error]
        half = len(asked) // 2
        return [*answer_each(answer, asked[:half]), *answer_each(answer, asked[half:])]
