"""Check our load generator against MLPerf's: both measure one export in this process, SingleStream and Offline.

LoadGen (https://github.com/mlcommons/inference/tree/master/loadgen) issues the queries and computes its own figures.
SingleStream corresponds to our closed loop of one caller. Offline passes all samples at once, like our closed loop with
as many callers. Both send the same texts, in their own order.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from suite import say

from deploykit.artifacts import load_manifest
from deploykit.bench.load import answer_texts, measure
from deploykit.bench.rows import read_rows
from deploykit.bench.scenarios import ClosedLoop
from deploykit.errors import DeploykitError, MissingDependencyError
from deploykit.hardware import available_cpus
from deploykit.tasks.opening import Predictor, open_predictor

ROOT = Path(__file__).parents[1]
SCENARIOS = ("SingleStream", "Offline")
_FIGURES = {
    "SingleStream": {"p50 ms": "50.00 percentile latency (ns)", "p99 ms": "99.00 percentile latency (ns)"},
    "Offline": {"texts/s": "Samples per second"},
}
"""Scenario -> our title of a figure, and its line in LoadGen's summary."""


def main() -> None:
    options = _options()
    try:
        task = load_manifest(options.export, "export").task
        texts, _ = read_rows(str(options.data), task, most=options.max_rows, seed=0)
        predictor = open_predictor(
            str(options.export), url="", engine=options.engine, precision=options.precision, threads=options.threads
        )
        print(f"{'':<24}{'LoadGen':>12}{'ours':>12}")
        for scenario in SCENARIOS:
            say(f"{scenario}: {options.seconds:g} s each")
            ours = _ours(predictor, texts, scenario, options.seconds)
            theirs = by_loadgen(predictor, texts, scenario, options.seconds)
            for title in _FIGURES[scenario]:
                print(f"{scenario + ' ' + title:<24}{theirs[title]:>12.2f}{ours[title]:>12.2f}")
    except DeploykitError as error:
        raise SystemExit(f"error: {error}") from None


def by_loadgen(predictor: Predictor, texts: Sequence[str], scenario: str, seconds: float) -> dict[str, float]:
    """Return MLPerf LoadGen's result of ``scenario``: p50 and p99 in ms, or texts/s. Raises MissingDependencyError
    without it.
    """
    try:
        import mlperf_loadgen as lg
    except ImportError:
        raise MissingDependencyError("LoadGen is not installed", "pip install 'deploykit[peers]'") from None

    def issue(samples: Sequence[Any]) -> None:
        answer_texts(predictor, [texts[sample.index] for sample in samples])
        lg.QuerySamplesComplete([lg.QuerySampleResponse(sample.id, 0, 0) for sample in samples])

    settings = lg.TestSettings()
    settings.scenario = getattr(lg.TestScenario, scenario)
    settings.mode = lg.TestMode.PerformanceOnly
    settings.min_duration_ms = round(1000 * seconds)
    # Send one query with all texts, regardless of the time; otherwise LoadGen guesses how many fit it.
    settings.min_query_count = len(texts) if scenario == "Offline" else 1
    settings.offline_expected_qps = 1
    with tempfile.TemporaryDirectory() as folder:
        log = lg.LogSettings()
        log.log_output.outdir = folder
        log.enable_trace = False
        sut = lg.ConstructSUT(issue, lambda: None)
        qsl = lg.ConstructQSL(len(texts), len(texts), lambda samples: None, lambda samples: None)
        try:
            lg.StartTestWithLogSettings(sut, qsl, settings, log, "")
        finally:
            lg.DestroyQSL(qsl)
            lg.DestroySUT(sut)
        summary = (Path(folder) / "mlperf_log_summary.txt").read_text(encoding="utf-8")
    return {
        title: read_summary(summary, line) * (1e-6 if title.endswith("ms") else 1)
        for title, line in _FIGURES[scenario].items()
    }


def read_summary(summary: str, line: str) -> float:
    """Return the figure after ``line`` in LoadGen's summary."""
    found = re.search(rf"^{re.escape(line)}\s*:\s*([0-9.e+]+)\s*$", summary, re.MULTILINE)
    if found is None:
        raise DeploykitError(f"LoadGen's summary has no line {line!r}:\n{summary}", "see its log")
    return float(found[1])


def _ours(predictor: Predictor, texts: Sequence[str], scenario: str, seconds: float) -> Mapping[str, float]:
    callers = ClosedLoop(1 if scenario == "SingleStream" else len(texts))
    measured = measure(predictor, texts, callers, seconds=seconds)
    latency = measured.latency_ms
    return {"p50 ms": latency["p50"], "p99 ms": latency["p99"], "texts/s": measured.throughput_per_s}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("export", type=Path, nargs="?", default=ROOT / "demo/exports/sentiment")
    parser.add_argument(
        "--data", type=Path, default=ROOT / "demo/runs/sentiment/splits/test.jsonl", help="texts to ask"
    )
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--threads", type=int, default=available_cpus())
    parser.add_argument("--max-rows", type=int, default=480)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    return parser.parse_args()


if __name__ == "__main__":
    main()
