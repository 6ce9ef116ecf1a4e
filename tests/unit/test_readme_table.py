from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TABLE: dict[str, Any] = runpy.run_path(str(ROOT / "bench" / "table.py"))
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readmes_figures_are_those_of_the_newest_results() -> None:
    assert TABLE["with_tables"](README, TABLE["newest"]()) == README


def test_without_a_result_there_is_no_table() -> None:
    emptied = TABLE["with_tables"](README, {})
    for name in ("classification", "exactness", "methods", "translation"):
        assert f"<!-- {name}:start -->\n<!-- {name}:end -->" in emptied
    assert TABLE["with_tables"](emptied, {}) == emptied
