"""Keep the answers of another model to the rows of a run, so that a continued run does not compute them again."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deploykit.training import processes
from deploykit.training.rows import Say

_CHUNK = 256
_TOLD = 10


def kept_answers(
    file: Path, asked: Sequence[str], answer: Callable[[Sequence[str]], Sequence[Any]], what: str, say: Say
) -> list[Any]:
    """Return the result of ``answer`` for each of ``asked``, as JSON. Results that are in ``file`` are reused.

    Of several processes that train together, the first computes them. Progress is printed as "translated 512 of 2,000" with ``what``
    "translated".
    """
    with processes.first_alone():
        found = _read(file)
        if found:
            say(f"{what} {len(found):,} of {len(asked):,} before")
        every = max(_CHUNK, len(asked) // _TOLD)
        for first in range(len(found), len(asked), _CHUNK):
            some = answer(asked[first : first + _CHUNK])
            with file.open("a", encoding="utf-8") as lines:
                lines.writelines(json.dumps(one, ensure_ascii=False) + "\n" for one in some)
            found += some
            if first // every != len(found) // every and len(found) < len(asked):
                say(f"{what} {len(found):,} of {len(asked):,}")
    return found


def _read(file: Path) -> list[Any]:
    """Return the complete lines of the file, and remove an incomplete last line of a killed run."""
    if not file.is_file():
        return []
    data = file.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        file.write_bytes(whole)
    return [json.loads(line) for line in whole.splitlines()]
