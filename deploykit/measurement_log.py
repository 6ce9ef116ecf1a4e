"""Measurements kept while they are made: a search that is killed need not make them again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from deploykit.artifacts import new_file

T = TypeVar("T")


class Trace:
    """What a command has measured, in a file beside what it writes, so that one that was killed goes on where it was.

    ``key`` identifies all that the measurements depend on: a file with another one is begun anew.
    """

    def __init__(self, path: Path, key: str, say: Callable[[str], None]) -> None:
        self._path, self._key = path, key
        self._measured: dict[str, Any] = {}
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        if record.get("key") == key:
            self._measured = record["measured"]
            say(f"{path}: {len(self._measured)} measurements of a run that did not finish are used")

    def measured(self, name: str, measure: Callable[[], T]) -> T:
        """What the file has under ``name``, or else what ``measure`` returns (plain JSON), which it then has."""
        if name not in self._measured:
            self._measured[name] = measure()
            with new_file(self._path) as file:
                file.write_text(json.dumps({"key": self._key, "measured": self._measured}, indent=1), encoding="utf-8")
        found: T = self._measured[name]
        return found

    def remove(self) -> None:
        """It is of no more use."""
        self._path.unlink(missing_ok=True)
