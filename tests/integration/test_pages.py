"""The pages of ``deploykit bench`` and of the suites under bench/ in a real browser."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from browser import REMEDY, Browser, find_browser
from paths import ROOT

from deploykit.bench.scenarios import ClosedLoop, Poisson, Scenario, Within
from deploykit.bench.targets import bench_targets
from deploykit.report.pages import write_report, write_tuning
from deploykit.report.record import results_of
from deploykit.report.svg import COLOURS

# By what a figure says it is: its box, texts that stick out of it, and what is drawn in a candidate's colour, by tag.
FIGURES = """[...document.querySelectorAll('svg')].map(svg => {
    const box = svg.getBoundingClientRect();
    const out = e => { const r = e.getBoundingClientRect(); return r.left < box.left - 1 || r.right > box.right + 1
        || r.top < box.top - 1 || r.bottom > box.bottom + 1; };
    const drawn = [...svg.querySelectorAll('path, use')].filter(e => {
        const r = e.getBoundingClientRect(), style = getComputedStyle(e);
        return r.width + r.height > 0 && COLOURS.some(c => style.fill == c || style.stroke == c);
    });
    const filled = drawn.filter(e => e.tagName == 'path' && getComputedStyle(e).fill != 'none');
    return {title: svg.getAttribute('aria-label').split('.')[0], width: box.width, height: box.height,
        sticking_out: [...svg.querySelectorAll('text')].filter(out).map(e => e.textContent),
        bars: filled.length, lines: drawn.filter(e => e.tagName == 'path').length - filled.length,
        marks: drawn.filter(e => e.tagName == 'use').length};
})""".replace("COLOURS", json.dumps(["rgb({}, {}, {})".format(*bytes.fromhex(colour[1:])) for colour in COLOURS]))
WIDTHS = "[document.documentElement.scrollWidth, window.innerWidth]"


class Figure(NamedTuple):
    title: str
    width: float
    height: float
    sticking_out: list[str]
    bars: int
    lines: int
    marks: int


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    binary = find_browser()
    if binary is None:
        pytest.skip(REMEDY)
    with Browser(binary, tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def report(tiny_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of two candidates under closed loops, random arrivals and a limit, with its record beside it."""
    out = tmp_path_factory.mktemp("report") / "bench.html"
    labels = ["negative", "neutral", "positive"]
    loads: list[Scenario] = [ClosedLoop(1), ClosedLoop(4), ClosedLoop(16), Poisson(50), Poisson(100), Within(2)]
    result = bench_targets(
        [str(tiny_export)], [f"w{i}" for i in range(30)], labels * 10, url="", engines=("onnxruntime",),
        precisions=("fp32", "int8"), scenarios=loads, rounds=2, seconds=0.05, warmup_s=0,
    ).to_json()  # fmt: skip
    out.with_suffix(".json").write_text(json.dumps(result), encoding="utf-8")
    write_report(result, out)
    return out


def look(browser: Browser, page: Path) -> list[Figure]:
    """Open ``page`` wide and narrow, light and dark, and check that all is drawn, without errors or other requests."""
    browser.complaints.clear()
    browser.asked.clear()
    for width, dark in ((1280, False), (390, True)):
        browser.open(page, width=width, dark=dark)
        figures = [Figure(**found) for found in browser.evaluate(FIGURES)]
        assert figures
        for figure in figures:
            assert figure.width > 200, figure
            assert figure.height > 40, figure
            assert figure.sticking_out == []
        needed, there = browser.evaluate(WIDTHS)
        assert needed <= there
    assert browser.complaints == []
    assert set(browser.asked) == {page.resolve().as_uri()}
    return figures


def test_every_figure_of_a_bench_is_drawn(browser: Browser, report: Path) -> None:
    figures = {figure.title: figure for figure in look(browser, report)}
    assert list(figures) == [
        "Throughput", "Latency", "Throughput against latency", "Scaling with callers", "Accuracy against speed",
        "Confusion matrix", "Memory and size",
    ]  # fmt: skip
    assert figures["Throughput"].bars == 2 * 4  # closed loops and the limit
    assert figures["Latency"].lines == 2 * 2  # with the legend's
    assert figures["Throughput against latency"].marks >= 2 * (3 + 2)
    assert figures["Scaling with callers"].marks >= 2 * 2 * 3
    assert figures["Accuracy against speed"].marks == 2 * 2  # with the legend's
    assert figures["Memory and size"].bars == 2 * 2


def test_the_limit_is_marked(browser: Browser, report: Path) -> None:
    browser.open(report)
    texts = browser.evaluate("[...document.querySelectorAll('svg text')].map(text => text.textContent)")
    assert "p99 limit 2 ms" in texts


def test_a_recorded_suite_is_drawn_again(browser: Browser, tmp_path: Path) -> None:
    recorded = sorted((ROOT / "bench" / "results").glob("*-translation.json"))[-1]
    suite = json.loads(recorded.read_text(encoding="utf-8"))
    del suite["workloads"][1:-1]  # to save time
    copy = tmp_path / recorded.name
    copy.write_text(json.dumps(suite), encoding="utf-8")
    subprocess.run([sys.executable, str(ROOT / "bench" / "page.py"), str(copy)], check=True)
    figures = look(browser, copy.with_suffix(".html"))
    bars = [figure.bars for figure in figures if figure.title == "Throughput"]
    results = list(results_of(suite).values())
    kinds = [[s["scenario"]["kind"] for s in result["candidates"][0]["scenarios"]] for result in results]
    drawn = [sum(kind != "poisson" for kind in each) for each in kinds]
    assert bars == [len(result["candidates"]) * count for result, count in zip(results, drawn)]
    targets = browser.evaluate("[...document.querySelectorAll('nav a')].map(a => !!document.querySelector(a.hash))")
    assert targets == [True] * len(results)


def test_a_sweep_has_a_plot_of_its_own(browser: Browser, report: Path, tmp_path: Path) -> None:
    record: dict[str, Any] = json.loads(report.with_suffix(".json").read_text(encoding="utf-8"))
    names = [candidate["name"] for candidate in record["candidates"]]
    workload = {"key": "threads", "axis": "threads", "values": dict(zip(names, (1, 2))), "bench": record}
    suite = {**{key: record[key] for key in ("schema", "started", "machine")}, "skipped": {"GPU": "there is none"}}
    write_report({**suite, "workloads": [workload]}, tmp_path / "sweep.html")
    figure = look(browser, tmp_path / "sweep.html")[0]
    assert figure.title == "Scaling with threads"
    assert figure.marks >= 2 * len(record["candidates"][0]["scenarios"])
    assert "there is none" in browser.evaluate("document.body.innerText")


def test_the_frontier_of_a_tuning_is_drawn(browser: Browser, tuning: dict[str, Any], tmp_path: Path) -> None:
    write_tuning(tuning, tmp_path / "tune.html")
    (figure,) = look(browser, tmp_path / "tune.html")
    assert figure.title == "Throughput against memory"
    assert figure.marks >= 3 + 4, "settings, and the legend's"
    assert "chosen" in browser.evaluate("[...document.querySelectorAll('svg text')].map(text => text.textContent)")


def test_an_invalid_record_is_refused_without_a_page(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("{}")
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "page.py"), str(tmp_path / "other.json")], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "other.json: is not a bench record" in done.stderr
    assert not list(tmp_path.glob("*.html"))


def test_the_browser_reports_errors_of_a_page(browser: Browser, tmp_path: Path) -> None:
    """Without this, the absence of errors on the other pages would prove nothing."""
    page = tmp_path / "broken.html"
    page.write_text('<svg><path d="M nonsense"/></svg><img src="missing.png"><script>undefined.x</script>')
    browser.complaints.clear()
    browser.open(page)
    assert any("attribute d" in complaint for complaint in browser.complaints)
    assert any("TypeError" in complaint for complaint in browser.complaints)
    assert any(url.endswith("missing.png") for url in browser.asked)
