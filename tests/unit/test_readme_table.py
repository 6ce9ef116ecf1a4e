from __future__ import annotations

import runpy
from typing import Any

from paths import ROOT

TABLE: dict[str, Any] = runpy.run_path(str(ROOT / "bench" / "table.py"))
PAGES = [page.read_text(encoding="utf-8") for page in TABLE["PAGES"]]


def test_the_figures_of_readme_and_docs_are_those_of_the_newest_results() -> None:
    for page in PAGES:
        assert TABLE["with_tables"](page, TABLE["newest"]()) == page


def test_without_a_result_there_is_no_table() -> None:
    emptied = [TABLE["with_tables"](page, {}) for page in PAGES]
    for name in ("architectures", "classification", "exactness", "methods", "translation", "summary"):
        assert sum(f"<!-- {name}:start -->\n<!-- {name}:end -->" in page for page in emptied) == 1
    assert [TABLE["with_tables"](page, {}) for page in emptied] == emptied


def test_the_readme_stays_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 10_000
