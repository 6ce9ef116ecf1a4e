from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_readmes_figures_are_those_of_the_newest_result() -> None:
    table = runpy.run_path(str(ROOT / "bench" / "table.py"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert table["with_table"](readme, table["newest"]()) == readme
