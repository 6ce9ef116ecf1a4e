"""The Python API: names, types and errors. tests/e2e/test_python_api.py runs all stages."""

from __future__ import annotations

import dataclasses
import inspect
import json
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from language_models import write_export
from paths import ROOT

import deploykit
from deploykit import errors
from deploykit.graphs.export_options import ExportOptions
from deploykit.stages.finetune_options import make_options
from deploykit.tasks.text_generation.chat_template import CHATML
from deploykit.tasks.types import Answer


def test_the_public_names_are_these() -> None:
    assert sorted(deploykit.__all__) == deploykit.__all__ == sorted(dir(deploykit))
    assert set(deploykit.__all__) == {
        "Answer", "ArtifactError", "CorruptArtifactError", "DataError", "DeploykitError", "EngineError", "EngineOptions",
        "Evaluation", "Explanation", "ExportError", "Exported", "Finetuned", "MissingDependencyError", "Model", "Packaged", "RequestError",
        "Server", "ServerError", "UsageError", "__version__", "export", "finetune", "load", "package",
    }  # fmt: skip


def test_every_public_name_exists_and_is_documented() -> None:
    for name in set(deploykit.__all__) - {"__version__"}:
        value = getattr(deploykit, name)
        assert value.__name__ == name
        assert inspect.isfunction(value) == name.islower()
        if name.islower():
            assert "Raises:" in inspect.getdoc(value), name
    results = (
        deploykit.Answer,
        deploykit.Evaluation,
        deploykit.Explanation,
        deploykit.Exported,
        deploykit.Finetuned,
        deploykit.Packaged,
    )
    for result in results:
        assert dataclasses.is_dataclass(result)
        assert result.__dataclass_params__.frozen  # type: ignore[attr-defined]
        assert result.__doc__
        assert not result.__doc__.startswith(f"{result.__name__}("), "written, not made by dataclass"
    assert all(
        issubclass(getattr(deploykit, n), deploykit.DeploykitError) for n in dir(errors) if n in deploykit.__all__
    )


def test_a_module_never_takes_the_place_of_a_public_name() -> None:
    packages = {path.name for path in (ROOT / "deploykit").iterdir() if path.is_dir()}
    modules = {path.stem for path in (ROOT / "deploykit").glob("*.py")}
    assert not (packages | modules) & set(deploykit.__all__)


def test_import_is_light_and_names_come_when_they_are_used() -> None:
    program = (
        "import sys; before = set(sys.modules)\n"
        "import deploykit\n"
        "print(sorted(m for m in set(sys.modules) - before if m.startswith('deploykit')), deploykit.__version__)\n"
        "print([m for m in ('numpy', 'click', 'torch', 'json', 'asyncio') if m in set(sys.modules) - before])\n"
        "deploykit.DataError, deploykit.finetune, deploykit.load, deploykit.Server\n"
        "print([m for m in ('numpy', 'torch', 'transformers', 'tritonclient', 'onnx') if m in sys.modules])\n"
        "try: deploykit.nothing\n"
        "except AttributeError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        f"['deploykit'] {deploykit.__version__}",
        "[]",
        "[]",
        "module 'deploykit' has no attribute 'nothing'",
    ]


def test_the_wheel_says_that_it_is_typed() -> None:
    program = (
        "from setuptools.dist import Distribution\n"
        "distribution = Distribution({'script_name': 'setup.py'}); distribution.parse_config_files()\n"
        "command = distribution.get_command_obj('build_py'); command.ensure_finalized()\n"
        "print([file for package, _, _, files in command.data_files if package == 'deploykit' for file in files])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "py.typed" in done.stdout
    assert (ROOT / "deploykit" / "py.typed").is_file()


def test_numbers_are_the_same_options_as_those_of_a_command() -> None:
    typed = make_options({"train": "a.csv", "num_train_epochs": 1.0, "warmup_ratio": 0.0, "max_length": 64})
    called = make_options({"train": "a.csv", "num_train_epochs": 1, "warmup_ratio": 0, "max_length": 64})
    assert json.dumps(dataclasses.asdict(called)) == json.dumps(dataclasses.asdict(typed))
    assert json.dumps(dataclasses.asdict(ExportOptions(max_drop=3))) == json.dumps(
        dataclasses.asdict(ExportOptions(max_drop=3.0))
    )


def test_predict_answers_with_every_field(tiny_export: Path) -> None:
    with deploykit.load(tiny_export, engine="onnxruntime", threads=1) as model:
        good, other = model.predict(["w1 w2", "w3"])
        assert isinstance(good, Answer)
        assert good.text == good.fields["label"]
        assert good.fields["score"] == max(good.fields["scores"].values())
        assert set(good.fields["scores"]) == set(model.task.labels)  # type: ignore[attr-defined]
        assert model.predict(["w3"]) == [other]
        assert model.classify(["w3"]) == [other], "the task's own verb"
        assert model.predictor.scores(["w1 w2"]).shape == (1, 3)  # type: ignore[attr-defined]


def test_translate_is_predict_of_a_translator(tiny_translation: Path) -> None:
    with deploykit.load(tiny_translation) as model:
        texts = ["Save the file.", "The quick brown fox."]
        (first, _) = model.translate(texts, num_beams=2, max_new_tokens=4)
        assert first.fields["translation"] == first.text
        assert first.tokens == first.fields["target_tokens"] <= 4
        assert model.predict(texts, num_beams=2, max_new_tokens=4)[0] == first
        with pytest.raises(AttributeError, match=r"a model that translates has no 'classify'; it has predict"):
            model.classify(texts)
        with pytest.raises(deploykit.UsageError, match="unknown parameter beams"):
            model.predict(texts, beams=2)


def test_a_language_model_generates_and_streams(tmp_path: Path, tiny_export: Path) -> None:
    with deploykit.load(write_export(tmp_path / "lm", template=CHATML)) as model:
        [answer] = model.generate(["list the file"], max_new_tokens=9)
        assert answer.fields["tokens"] <= 9
        assert "".join(model.stream("list the file", max_new_tokens=9)) == answer.text
        messages = [{"role": "user", "content": "list the file"}]
        assert "".join(model.stream(messages, max_new_tokens=9)) == answer.text
        with pytest.raises(deploykit.UsageError, match="temperature is -1"):
            list(model.stream(messages, temperature=-1))
    with deploykit.load(tiny_export) as model, pytest.raises(deploykit.UsageError, match="classifies cannot stream"):
        list(model.stream("w1"))


def test_an_empty_text_has_the_answer_of_the_model(tiny_export: Path) -> None:
    with deploykit.load(tiny_export) as model:
        (empty, blank, _) = model.predict(["", " \n", "w1"])
        assert empty == blank
        assert list(empty.fields["scores"].values()) == pytest.approx(
            model.predictor.scores([""])[0].tolist(), abs=1e-6
        )


def test_rows_are_evaluated_from_a_file_or_as_they_are(tiny_export: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": f"w{i} w{i + 1}", "label": "positive"} for i in range(6)] + [
        {"text": None, "label": "x"}
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with deploykit.load(tiny_export) as model:
        seen: list[tuple[int, int]] = []
        from_file = model.evaluate(tmp_path / "rows.jsonl", progress=lambda done, of: seen.append((done, of)))
        assert (from_file.rows, from_file.skipped) == (6, 1)
        assert seen[-1] == (6, 6)
        assert model.evaluate(iter(rows)) == from_file
        named = model.evaluate(
            [{"t": row["text"], "l": row["label"]} for row in rows], text_column="t", label_column="l"
        )
        assert named.metrics == from_file.metrics


@pytest.mark.parametrize(
    ("call", "kind", "says"),
    [
        (lambda model: model.predict("w1"), errors.UsageError, "one string"),
        (lambda model: model.predict(["w1", "w" * 1_000_001]), errors.DataError, "text 2: the text has 1,000,001"),
        (
            lambda model: model.predict(["w1"], num_beams=2),
            errors.UsageError,
            "num_beams is for a model that generates",
        ),
        (lambda model: model.evaluate("no.csv"), errors.DataError, "no.csv"),
        (lambda model: model.evaluate([{"text": "w1", "label": "odd"}]), errors.DataError, "'odd'"),
        (lambda model: model.evaluate(["w1"]), errors.DataError, "a row is not a mapping"),
        (lambda model: model.evaluate([{"text": "w1", "label": object()}]), errors.DataError, "a row is not a mapping"),
        (lambda model: model.evaluate([{"text": "w1"}], colour="red"), errors.UsageError, "colour"),
    ],
)
def test_refused_texts_and_options_are_named(
    tiny_export: Path, call: Callable[[deploykit.Model], object], kind: type[Exception], says: str
) -> None:
    with deploykit.load(tiny_export, engine="onnxruntime") as model, pytest.raises(kind) as refused:
        call(model)
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda path: deploykit.finetune("m", train="t.csv", output_dir=path, epochs=1), "unknown option 'epochs'"),
        (lambda path: deploykit.finetune("m", train="t.csv", output_dir=path, epochs=1), "write num_train_epochs"),
        (
            lambda path: deploykit.finetune("m", train="t.csv", output_dir=path, task="cooking"),
            "unknown task 'cooking'",
        ),
        (lambda path: deploykit.finetune("m", train="t.csv", output_dir=path, dropout=7), "--dropout is 7"),
        (lambda path: deploykit.finetune("m", output_dir=path), "--train is missing"),
        (lambda path: deploykit.finetune(train="t.csv", output_dir=path), "no checkpoint to fine-tune"),
        (lambda path: deploykit.export("m", path, int7=True), "unknown option 'int7'"),
        (lambda path: deploykit.export("m", path, max_drop=-1), "--max-drop is -1"),
        (lambda path: deploykit.package("e", "n", path, threds=1), "unknown option 'threds'"),
        (lambda path: deploykit.package("e", "n/m", path), "model name 'n/m' is not allowed"),
    ],
)
def test_senseless_options_are_refused(call: Callable[[Path], object], says: str, tmp_path: Path) -> None:
    with pytest.raises(deploykit.UsageError) as refused:
        call(tmp_path / "out")
    assert says in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_packaging_again_refuses_settings_without_effect(tiny_export: Path, tmp_path: Path) -> None:
    first = deploykit.package(tiny_export, "tiny", tmp_path, max_batch_size=8, engine="onnxruntime")
    assert (first.name, first.version, first.reused) == ("tiny", 1, False)
    assert deploykit.package(tiny_export, "tiny", tmp_path, engine="onnxruntime").reused
    with pytest.raises(deploykit.UsageError, match="max_batch_size has no effect"):
        deploykit.package(tiny_export, "tiny", tmp_path, max_batch_size=9)


def test_a_lost_server_is_an_error_at_the_end_of_the_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Triton: tests how the block uses the supervision."""
    from deploykit.triton import server as module

    calls: list[str] = []

    def supervise(self: object, stop: object) -> None:
        raise deploykit.ServerError("Triton ended")

    monkeypatch.setattr(module.TritonServer, "start", lambda self: calls.append("start"))
    monkeypatch.setattr(module.TritonServer, "stop", lambda self: calls.append("stop"))
    monkeypatch.setattr(module.TritonServer, "supervise", supervise)
    with pytest.raises(deploykit.ServerError, match="Triton ended"), deploykit.Server(tmp_path):
        calls.append("body")
    assert calls == ["start", "body", "stop"]
    with pytest.raises(ZeroDivisionError), deploykit.Server(tmp_path):
        _ = 1 / 0
    assert calls[-1] == "stop", "the block's own error is not hidden"
    assert isinstance(deploykit.Server(tmp_path), deploykit.Server)
    assert isinstance(module, types.ModuleType)
