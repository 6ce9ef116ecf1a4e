"""The search for settings with known figures, and parsing of limits."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from deploykit.artifacts import load_manifest
from deploykit.errors import UsageError
from deploykit.measurement_log import MeasurementLog
from deploykit.report.pages import write_tuning
from deploykit.runtime.find_graphs import find_graphs
from deploykit.runtime.serving_settings import ServingSettings
from deploykit.runtime.tuned_settings import read_tuned, write_tuned
from deploykit.tasks.protocol import TaskFacts
from deploykit.tune.limits import Slo, parse_slo
from deploykit.tune.search import Configuration, Limits, Round, Trial, choose, search, verdict
from deploykit.units import parse_size, parse_time

GRAPHS = [("openvino", "int8"), ("openvino", "fp32"), ("onnxruntime", "int8"), ("onnxruntime", "fp32")]
PRESENT = Configuration("onnxruntime", "int8", ServingSettings(instances=2))
BEST = Configuration("openvino", "int8", ServingSettings(instances=4, threads=1, preferred_batch_size=16))
SLO = Slo("p99", 50.0)


class Machine:
    """A simulated machine of four CPUs on which each setting has an effect. A round takes ten seconds."""

    def __init__(self, *, luck: Callable[[Configuration, int], float] = lambda choice, number: 1.0) -> None:
        self.luck = luck
        self.asked: list[tuple[Configuration, int]] = []

    def rate(self, choice: Configuration) -> float:
        s = choice.settings
        rate = {"openvino": 120.0, "onnxruntime": 100.0}[choice.engine] * {"int8": 1.0, "fp32": 0.4}[choice.precision]
        rate *= {1: 0.5, 2: 1.0, 4: 1.5, 8: 1.2}[s.instances or 2] * {0: 1.0, 1: 1.2, 2: 1.1, 4: 0.9}[s.threads]
        return rate * {0: 1.0, 8: 0.9, 16: 1.3, 32: 1.1}[s.preferred_batch_size] * (1 - s.max_queue_delay_us / 1e4)

    def memory(self, choice: Configuration) -> float:
        return 100.0 + {"openvino": 150.0, "onnxruntime": 100.0}[choice.engine] * (choice.settings.instances or 2)

    def measure(self, choice: Configuration, number: int, expected: float | None) -> Round:
        self.asked.append((choice, number))
        rate = self.rate(choice) * self.luck(choice, number)
        return Round(rate, {"p50": 9.0, "p90": 20.0, "p99": 48.0}, self.memory(choice), 10.0)


@pytest.fixture(autouse=True)
def _four_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})


@pytest.fixture
def task(tiny_export: Path) -> TaskFacts:
    return load_manifest(tiny_export, verify=False).task


def limits(max_memory_mb: float | None = None, budget_s: float = 1e4) -> Limits:
    return Limits(SLO, max_memory_mb, budget_s)


def run(machine: Machine, task: TaskFacts, limits: Limits, said: list[str] | None = None) -> list[Trial]:
    return search(task, PRESENT, GRAPHS, limits, machine.measure, (said if said is not None else []).append)


def test_the_best_of_all_settings_is_found_without_trying_them_all(task: TaskFacts) -> None:
    machine = Machine()
    said: list[str] = []
    trials = run(machine, task, limits(), said)
    assert trials[0].choice == PRESENT
    found = choose(trials, limits())
    assert found is not None
    assert found.choice == BEST
    assert found.rate_per_s == pytest.approx(120 * 1.5 * 1.2 * 1.3)
    assert len(trials) < 30, "of 4 x 4 x 4 x 4 x 4"
    assert len(found.rounds) == 3, "the best ones are measured again"
    best = (
        "openvino int8, 4 instances × 1 thread, batches of 16, delay 0 ms: 280.8/s with p99 within 50 ms (p50 9.0 ms, "
    )
    assert sum(best in line for line in said) == 3
    again = Machine()
    assert run(again, task, limits()) == trials
    assert again.asked == machine.asked


def test_equivalent_settings_are_measured_once(task: TaskFacts) -> None:
    trials = run(Machine(), task, limits())
    share = {1: 4, 2: 4, 4: 2, 8: 1}  # of four CPUs, where threads are 0
    served = set()
    for trial in trials:
        settings = trial.choice.settings
        threads = settings.threads or share[settings.instances or 2]
        served.add(replace(trial.choice, settings=replace(settings, threads=threads)))
    assert len(served) == len(trials) > 10


def test_the_best_within_the_memory_is_chosen_and_the_others_say_why_not(task: TaskFacts) -> None:
    allowed = limits(max_memory_mb=420.0)
    trials = run(Machine(), task, allowed)
    found = choose(trials, allowed)
    assert found is not None
    assert found.memory_mb == 400.0
    assert (found.choice.engine, found.choice.settings.instances) == ("openvino", 2)
    why = {verdict(trial, found, allowed) for trial in trials}
    assert "chosen" in why
    assert "takes 700 MB, more than 420" in why
    assert any(text.startswith("answers ") and text.endswith("% fewer") for text in why)


def test_one_lucky_round_does_not_win(task: TaskFacts) -> None:
    lucky = replace(BEST, settings=replace(BEST.settings, max_queue_delay_us=2000))

    def luck(choice: Configuration, number: int) -> float:
        return 9.0 if choice == lucky and number == 0 else 1.0

    machine = Machine(luck=luck)
    found = choose(run(machine, task, limits()), limits())
    assert (lucky, 0) in machine.asked
    assert found is not None
    assert found.choice == BEST


def test_the_present_settings_stay_unless_others_are_better_beyond_the_noise() -> None:
    def trial(instances: int, rate: float, memory: float) -> Trial:
        choice = replace(PRESENT, settings=ServingSettings(instances=instances))
        return Trial(choice, (Round(rate, {"p99": 40.0}, memory, 1.0),))

    present, lean, fast = trial(2, 100.0, 500.0), trial(1, 101.0, 300.0), trial(4, 104.0, 900.0)
    assert choose([present, lean, fast], limits()) is present
    assert verdict(fast, present, limits()) == "as fast within 5%, and takes 400 MB more"
    assert verdict(lean, present, limits()) == "as fast within 5%, and no better"
    slow = trial(2, 90.0, 500.0)
    assert choose([slow, lean, fast], limits()) is lean, (
        "of those that are as good, the one that takes the least memory"
    )
    assert choose([slow, fast], limits(max_memory_mb=100.0)) is None


@pytest.mark.parametrize(("budget_s", "rounds"), [(1.0, 1), (29.0, 1), (45.0, 4), (120.0, 12)])
def test_no_round_starts_that_would_exceed_the_budget(task: TaskFacts, budget_s: float, rounds: int) -> None:
    machine = Machine()
    said: list[str] = []
    trials = run(machine, task, limits(budget_s=budget_s), said)
    assert len(machine.asked) == rounds
    assert said[-1].startswith(f"the time is up after {len(trials)} settings")
    assert choose(trials, limits()) is not None


def test_a_killed_search_is_resumed(task: TaskFacts, tmp_path: Path) -> None:
    whole = Machine()
    expected = run(whole, task, limits())
    path = tmp_path / "out.json.search.json"

    def kept(machine: Machine, dies_at: int) -> Callable[[Configuration, int, float | None], Round]:
        trace = MeasurementLog(path, "k", lambda line: None)

        def measure(choice: Configuration, number: int, expected: float | None) -> Round:
            def once() -> dict[str, Any]:
                if len(machine.asked) == dies_at:
                    raise KeyboardInterrupt
                return asdict(machine.measure(choice, number, expected))

            return Round(**trace.measured(json.dumps([number, asdict(choice)]), once))

        return measure

    first, second = Machine(), Machine()
    with pytest.raises(KeyboardInterrupt):
        search(task, PRESENT, GRAPHS, limits(), kept(first, 5), lambda line: None)
    assert search(task, PRESENT, GRAPHS, limits(), kept(second, 1000), lambda line: None) == expected
    assert first.asked + second.asked == whole.asked


def test_a_setting_that_does_not_run_or_is_too_slow_loses(task: TaskFacts) -> None:
    failed = Trial(PRESENT, (Round(None, {}, None, 1.0, "model x cannot be loaded"),))
    slow = Trial(PRESENT, (Round(None, {"p50": 55.0, "p90": 60.0, "p99": 70.0}, 100.0, 1.0),))
    assert choose([failed, slow], limits()) is None
    assert verdict(failed, None, limits()) == "does not run: model x cannot be loaded"
    assert verdict(slow, None, limits()) == "no rate is within the limit: p99 is 70.0 ms"
    assert Trial(PRESENT, (*slow.rounds, Round(50.0, {"p99": 49.0}, 100.0, 1.0))).rate_per_s == 0, "it does not always"


def test_the_page_says_what_was_chosen_and_needs_no_network(tuning: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_tuning(tuning, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "&lt;tweets&gt;" in page
    assert "<tweets>" not in page
    assert all(f"why {i}" in page for i in range(3))
    for label in (
        "chosen",
        "served at present",
        "frontier",
        "most memory allowed",
        "openvino fp32, outside the limits",
    ):
        assert f">{label}</text>" in page, label
    assert "other programs" in page
    assert "http" not in page.replace("http://www.w3.org/", "")


def test_limits_as_they_are_typed() -> None:
    assert parse_slo("p99=50ms") == Slo("p99", 50.0)
    assert parse_slo(" P50=0.2s") == Slo("p50", 200.0)
    assert [parse_size("--max-memory", text) for text in ("1GB", "512MiB", "1.5 gb")] == [1000.0, 536.870912, 1500.0]
    assert [parse_time("--time", text) for text in ("90s", "10m", ".5h")] == [90.0, 600.0, 1800.0]
    for text in ("p98=50ms", "p99", "p99=", "p99=50", "p99=0ms", "p99=-3ms", "p99=fast", "mean=1ms", "p99=11s"):
        with pytest.raises(UsageError, match="--slo"):
            parse_slo(text)
    for text in ("1", "GB", "0GB", "1 kg", "nan GB"):
        with pytest.raises(UsageError, match="--max-memory"):
            parse_size("--max-memory", text)
    with pytest.raises(UsageError, match="--time '10' is not a time"):
        parse_time("--time", "10")


def test_engine_auto_uses_the_measurement_of_this_machine(
    make_tiny_export: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = make_tiny_export(tmp_path / "e")
    manifest = load_manifest(export)

    def auto(precision: str = "auto") -> tuple[str, str]:
        graphs = find_graphs(export, manifest, engine="auto", precision=precision)
        return graphs.engine, graphs.precision

    before = auto()
    assert before == ("openvino", "int8")
    write_tuned(export, manifest, engine="onnxruntime", precision="fp32", slo=str(SLO), rate_per_s=9.0)
    assert auto() == auto("fp32") == ("onnxruntime", "fp32")
    assert auto("int8") == before, "of INT8 nothing was measured to be best"
    assert find_graphs(export, manifest, engine="openvino", precision="auto").engine == "openvino"
    assert load_manifest(export).digest == manifest.digest, "the export is what it was"
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    assert read_tuned(export, manifest) is None, "another machine"
    assert auto() == before
    (export / "tuned.json").write_text("{")
    assert auto() == before
