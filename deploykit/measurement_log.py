"""Save measurements to disk as they are made, so that a killed search need not repeat them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from deploykit.artifacts import new_file

T = TypeVar("T")


class MeasurementLog:
    """A log of measurements, in a file next to the result, from which a killed command continues.

    ``key`` identifies everything that the measurements depend on. A file with another key is discarded.
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
            say(f"{path}: {len(self._measured)} measurements of an unfinished run are reused")
        elif record.get("measured"):
            say(
                f"{path}: {len(record['measured'])} measurements are not reused: they are of other options or rows, or of other "
                "versions of the packages"
            )

    def measured(self, name: str, measure: Callable[[], T]) -> T:
        """Return the logged value of ``name``; if there is none, log and return the result of ``measure`` (plain
        JSON)."""
        if name not in self._measured:
            self._measured[name] = measure()
            with new_file(self._path) as file:
                file.write_text(json.dumps({"key": self._key, "measured": self._measured}, indent=1), encoding="utf-8")
        found: T = self._measured[name]
        return found

    def remove(self) -> None:
        """Delete the log."""
        self._path.unlink(missing_ok=True)
