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
    for name in (
        "answering",
        "answering-amx",
        "architectures",
        "classification",
        "defaults",
        "exactness",
        "gpu",
        "methods",
        "translation",
        "summary",
    ):
        assert sum(f"<!-- {name}:start -->\n<!-- {name}:end -->" in page for page in emptied) == 1
    assert [TABLE["with_tables"](page, {}) for page in emptied] == emptied


def test_a_run_on_a_gpu_is_shown_step_by_step() -> None:
    rates = {"texts per second": {"1": 812.5, "256": 20400.0}}
    steps = {
        "doctor": {"status": "ok", "seconds": 4.2, "result": {"cpu": "x"}},
        "classify": {"status": "timed out", "seconds": 40.0, "result": {"onnxruntime": rates}},
    }
    record = {"started": "2026-12-01T10:00:00+00:00", "card": "NVIDIA H200", "device": "cuda", "steps": steps}
    (page,) = (page for page in PAGES if "<!-- gpu:start -->" in page)
    shown = TABLE["with_tables"](page, {"gpu": record}).splitlines()
    assert "2026-12-01, NVIDIA H200: `bench/gpu/run.sh cuda`." in shown
    assert "| doctor | ok | 4 | |" in shown
    assert "| classify | timed out | 40 | onnxruntime: texts per second 1 812.5; 256 2.04e+04 |" in shown


def test_the_readme_stays_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 10_000
