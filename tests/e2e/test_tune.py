"""The command ``deploykit tune``, on a real Triton and with given measurements."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from words import with_options

from deploykit.artifacts import digest_path, load_manifest
from deploykit.runtime.find_graphs import find_graphs
from deploykit.runtime.serving_settings import ServingSettings
from deploykit.triton.repository import check_config, package, read_config
from deploykit.tune.search import Configuration, Round

Deploykit = Callable[..., tuple[int, str, str]]


@pytest.fixture
def export(make_tiny_export: Callable[..., Path], tmp_path: Path) -> Path:
    return make_tiny_export(tmp_path / "exports" / "a")


@pytest.fixture
def repository(export: Path, tmp_path: Path) -> Path:
    """A repository with the model tiny for ONNX Runtime in fp32, and an edited config."""
    repository = tmp_path / "models"
    settings = ServingSettings(max_queue_size=77)
    package(export, "tiny", repository, engine="onnxruntime", precision="fp32", settings=settings)
    config = repository / "tiny" / "config.pbtxt"
    config.write_text(f"# Ours.\n{config.read_text()}")
    return repository


@pytest.fixture
def words(export: Path, repository: Path, tmp_path: Path) -> tuple[object, ...]:
    data = tmp_path / "texts.csv"
    data.write_text("text\n" + "".join(f"w{i} w{i + 1} w{i + 2}\n" for i in range(50)))
    return (
        "tune", "tiny", "--model-repository", repository, "--export", export, "--data", data, "--output", tmp_path / "t.json",
    )  # fmt: skip


def fake(
    monkeypatch: pytest.MonkeyPatch, measure: Callable[[Configuration, int], Round]
) -> list[tuple[Configuration, int]]:
    """Replace measuring by ``measure``. Returns the list of measured configurations."""
    asked: list[tuple[Configuration, int]] = []

    def measured(subject: Any, choice: Configuration, *where: Any, seed: int, **how: Any) -> Round:
        asked.append((choice, seed))
        return measure(choice, seed)

    monkeypatch.setattr("deploykit.tune.run.measure_served", measured)
    return asked


def known(choice: Configuration, number: int) -> Round:
    """Return a measurement; OpenVINO in INT8 with batches of 16 is the best."""
    rate = 100.0 + 50 * (choice.engine == "openvino") + 50 * (choice.precision == "int8")
    rate += 70 * (choice.settings.preferred_batch_size == 16)
    return Round(rate, {"p50": 5.0, "p90": 20.0, "p99": 30.0}, 100.0 * (choice.settings.instances or 2), 10.0)


def test_a_model_is_tuned_on_a_triton_of_its_own(
    deploykit: Deploykit, words: tuple[object, ...], repository: Path
) -> None:
    before = digest_path(repository / "tiny" / "1")
    code, out, err = deploykit(
        *words, "--slo", "p99=900ms", "--max-memory", "4GB", "--engine", "onnxruntime", "--time", "9s", "--seconds",
        0.05, "--json",
    )  # fmt: skip
    assert code == 0, err
    record = json.loads(out)
    assert record["trials"][0]["name"].startswith("onnxruntime fp32, 2 instances")
    assert {trial["engine"] for trial in record["trials"]} == {"onnxruntime"}
    for trial in record["trials"]:
        assert trial["holds"], trial
        assert trial["rate_per_s"] > 1
        assert 0 < trial["latency_ms"]["p50"] <= trial["latency_ms"]["p99"] <= 900
        assert 40 < trial["memory_mb"] < 4000
        assert f"{trial['name']}: " in err, "progress is printed"
    assert record["chosen"]["verdict"] == "chosen"
    assert record["command"].startswith("deploykit tune tiny --model-repository")
    assert digest_path(repository / "tiny" / "1") == before


def test_the_best_settings_are_put_to_use_and_all_else_stays(
    deploykit: Deploykit, words: tuple[object, ...], export: Path, repository: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    fake(monkeypatch, known)
    model = repository / "tiny"
    old = (model / "config.pbtxt").read_text()
    code, out, err = deploykit(*words, "--slo", "p99=50ms")
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].split() == ["settings", "requests/s", "p50", "ms", "p99", "ms", "MB", "verdict"]
    assert any(line.startswith("openvino int8, ") and line.endswith("  chosen") for line in lines)
    assert any("  answers 26% fewer" in line for line in lines)
    assert f"{model / 'config.pbtxt'}: changed (undo: mv {model / 'config.pbtxt.before-tune'}" in out
    config = read_config(model / "config.pbtxt")
    assert list(config.dynamic_batching.preferred_batch_size) == [16]
    assert config.instance_group[0].count == 1, "as fast as more, in the least memory"
    assert config.dynamic_batching.default_queue_policy.max_queue_size == 77
    assert (model / "config.pbtxt").read_text().startswith("# Ours.\n")
    assert (model / "config.pbtxt.before-tune").read_text() == old
    added = load_manifest(model / "2")
    assert (added.options["engine"], added.options["precision"]) == ("openvino", "int8")
    check_config(model / "config.pbtxt", added.task, None, "openvino")
    assert find_graphs(export, load_manifest(export), engine="auto", precision="auto").engine == "openvino"
    assert {p.name for p in tmp_path.iterdir()} == {"exports", "models", "texts.csv", "t.json", "t.html"}
    assert json.loads((tmp_path / "t.json").read_text())["trials"][0]["rate_per_s"] == 100

    code, out, err = deploykit(*words, "--slo", "p99=50ms", "--force")
    assert code == 0, err
    assert "the present settings are as good as any that were tried" in out
    assert not (model / "3").exists()


def test_without_the_export_engine_and_precision_stay(
    deploykit: Deploykit, words: tuple[object, ...], repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = fake(monkeypatch, known)
    alone = [word for i, word in enumerate(words) if "--export" not in words[max(0, i - 1) : i + 1]]
    code, _, err = deploykit(*alone, "--slo", "p99=50ms")
    assert code == 0, err
    assert "onnxruntime fp32 as packaged; pass --export EXPORT to search engine and precision too" in err
    assert {(choice.engine, choice.precision) for choice, _ in asked} == {("onnxruntime", "fp32")}
    assert not (repository / "tiny" / "2").exists()


def test_a_killed_tuning_is_resumed(
    deploykit: Deploykit, words: tuple[object, ...], repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = repository / "tiny" / "config.pbtxt"
    before = config.read_text()

    def killed(choice: Configuration, number: int) -> Round:
        if choice.settings.instances == 1:
            raise KeyboardInterrupt
        return known(choice, number)

    first = fake(monkeypatch, killed)
    assert deploykit(*words, "--slo", "p99=50ms")[0] == 130
    assert config.read_text() == before
    assert (tmp_path / "t.json.search.json").is_file()
    second = fake(monkeypatch, known)
    code, _, err = deploykit(*words, "--slo", "p99=50ms")
    assert code == 0, err
    assert f"t.json.search.json: {len(first) - 1} measurements of an unfinished run are reused" in err
    assert set(first[:-1]) & set(second) == set(), "nothing is measured twice"
    assert not (tmp_path / "t.json.search.json").exists()


def test_a_translator_is_tuned_by_the_rows_of_a_step(
    deploykit: Deploykit, tiny_translation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(choice: Configuration, number: int) -> Round:
        return Round(10.0 + (choice.settings.max_rows == 32) * 5, {"p50": 5.0, "p90": 20.0, "p99": 30.0}, 100.0, 10.0)

    export = shutil.copytree(tiny_translation, tmp_path / "export")
    package(export, "en-fr", tmp_path / "models")
    (tmp_path / "lines.txt").write_text("Save the file.\nOpen the window.\n")
    fake(monkeypatch, measure)
    words = ("tune", "en-fr", "--model-repository", tmp_path / "models", "--export", export, "--data", tmp_path / "lines.txt",
             "--slo", "p99=2s", "--output", tmp_path / "t.json")  # fmt: skip
    code, out, err = deploykit(*words)
    assert code == 0, err
    assert "32 rows a step" in out
    config = read_config(tmp_path / "models" / "en-fr" / "config.pbtxt")
    assert config.parameters["max_rows"].string_value == "32"
    code, _, err = deploykit("tune", "en-fr_stream", *words[2:], "--force")
    assert (code, "tune en-fr, whose answers it streams" in err) == (2, True)


@pytest.mark.parametrize(
    ("change", "code", "named"),
    [
        (("--slo", "p98=50ms"), 2, ["unknown percentile 'p98'", "p50, p90, p99"]),
        (("--slo", "p99=soon"), 2, ["'soon' is not a time", "50ms"]),
        (("--max-memory", "lots"), 2, ["--max-memory 'lots'", "1GB"]),
        (("--time", "5"), 2, ["--time '5'", "10m"]),
        (("--output", "t.txt"), 2, ["--output t.txt", ".json"]),
        (("--engine", "magic"), 1, ["magic", "no graph"]),
        (("--source-column", "en"), 2, ["--source-column", "classifies"]),
        (("--model-repository", "nowhere"), 1, ["nowhere: no such directory", "deploykit package"]),
        (("--data", "nowhere.csv"), 1, ["nowhere.csv"]),
    ],
)
def test_wrong_options_are_refused(
    deploykit: Deploykit, words: tuple[object, ...], tmp_path: Path, change: tuple[str, ...], code: int,
    named: list[str],
) -> None:  # fmt: skip
    there = sorted(tmp_path.rglob("*"))
    got, out, err = deploykit(*with_options((*words, "--slo", "p99=50ms"), *change), "--json")
    assert got == code, err
    assert json.loads(out)["error"]["remedy"]
    for part in named:
        assert part in err
    assert sorted(tmp_path.rglob("*")) == there


def test_missing_models_and_exports_are_refused(
    deploykit: Deploykit, words: tuple[object, ...], make_tiny_export: Callable[..., Path], tmp_path: Path
) -> None:
    slo = ("--slo", "p99=50ms")
    code, _, err = deploykit("tune", "tweets", *words[2:], *slo)
    assert (code, "has no packaged model 'tweets' (it has: tiny)" in err) == (1, True)
    other = make_tiny_export(tmp_path / "other", seed=1)
    code, _, err = deploykit(*with_options(words, *slo, "--export", other))
    assert (code, f"remedy: run deploykit package {other} --name tiny" in err) == (1, True)
    code, _, err = deploykit("tune", "tiny", *slo, "--model-repository", tmp_path / "models")
    assert (code, "give --data FILE" in err) == (2, True)
    code, _, err = deploykit(*words[:4], *words[6:], *slo, "--precision", "int8")
    assert (code, "pass --export" in err) == (2, True)
    (tmp_path / "t.json").write_text("{}")
    code, _, err = deploykit(*words, *slo)
    assert (code, "t.json: already exists" in err) == (1, True)


def test_unreachable_limits_report_the_best_measurement(
    deploykit: Deploykit, words: tuple[object, ...], repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = digest_path(repository)
    fake(monkeypatch, lambda choice, number: Round(None, {"p50": 2.0, "p90": 3.0, "p99": 4.25}, 100.0, 10.0))
    code, _, err = deploykit(*words, "--slo", "p99=1ms")
    assert code == 1
    assert "no settings hold p99 within 1 ms; the best was 4.2 ms with one caller: onnxruntime fp32" in err
    assert "remedy: allow more (--slo p99=...)" in err
    fake(monkeypatch, known)
    code, _, err = deploykit(*words, "--slo", "p99=50ms", "--max-memory", "50MB")
    assert code == 1
    assert "the least was 100 MB" in err
    assert "allow more --max-memory" in err
    assert digest_path(repository) == before


def test_without_triton_the_remedy_is_named(
    deploykit: Deploykit, words: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "pytriton" else find(name, *a))
    code, _, err = deploykit(*words, "--slo", "p99=50ms")
    assert code == 1
    assert "the embedded Triton server (nvidia-pytriton) is not installed" in err
    assert "pip install 'deploykit[serve]'" in err
