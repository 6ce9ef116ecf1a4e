"""Answer rows together; a refused row does not affect the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from deploykit.errors import DataError, RequestError
from deploykit.runtime.finite import NoNumberError

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


def stop_at_no_number(origins: Iterable[str], found: Iterable[object]) -> None:
    """Raise DataError for the first row whose answer in ``found`` is a NoNumberError.

    A checkpoint that computes NaN is not exported: INT8 forms saturate, and would hide it.
    """
    for origin, one in zip(origins, found):
        if isinstance(one, NoNumberError):
            raise DataError(f"{origin}: {one.message}", "train the model again, or leave the row out")
