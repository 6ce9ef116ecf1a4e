"""Pairs of texts: what transformers answers to both, through training, export, every engine and Triton's protocol."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from google.protobuf.json_format import MessageToDict

from deploykit import load
from deploykit.artifacts import load_manifest
from deploykit.cli import main
from deploykit.errors import DataError, UsageError
from deploykit.runtime.engines import ENGINES
from deploykit.tasks.classification.facts import as_text, from_text
from deploykit.tasks.classification.served import ServedClassifier
from deploykit.triton.in_process import InProcessModel
from deploykit.triton.kserve import KServeServer
from deploykit.triton.repository import package, read_config

PAIRS = [
    ("w1 w2 w3", "w1"),
    ("w1", "w1 w2 w3"),
    ("", "w5"),
    ("w9 " * 40, "w7 " * 40),
    ("w9 w1 " * 300, "w7 w8 w2 " * 200),
    ('w3 "w4" | w5', "w6\nw7"),
]


def run(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, make_tiny_checkpoint: Callable[..., Path]) -> Path:
    """A folder with rows.csv, the checkpoint c, the run r and its export e."""
    folder = tmp_path_factory.mktemp("pairs")
    draw = random.Random(0)
    lines = ["premise,hypothesis,label"]
    for i in range(80):
        words = [f"w{draw.randrange(200)}" for _ in range(draw.randint(1, 30))]
        other = words[0] if i % 2 else f"w{draw.randrange(200)}"
        lines.append(f"{' '.join(words)},{other},{'yes' if words[0] == other else 'no'}")
    (folder / "rows.csv").write_text("\n".join(lines) + "\n")
    make_tiny_checkpoint(folder / "c", positions=72, initializer_range=0.15)
    settings = json.loads((folder / "c" / "tokenizer_config.json").read_text())
    settings["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]  # as BERT's tokenizers have
    (folder / "c" / "tokenizer_config.json").write_text(json.dumps(settings))
    columns = ("--text-column", "premise", "--text-column", "hypothesis")
    steps = ("--max-steps", 2, "--learning-rate", 1e-3, "--per-device-train-batch-size", 8)
    code, out = run(
        "finetune", folder / "c", "--train", folder / "rows.csv", *columns, *steps, "--output-dir", folder / "r"
    )
    assert code == 0, out
    code, out = run(
        "export", folder / "r", "--int8", "--calibration-rows", 32, "--max-drop", 100, "--output-dir", folder / "e"
    )
    assert code == 0, out
    return folder


def of_transformers(folder: Path) -> np.ndarray[Any, Any]:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        logits = [
            model(**tokenizer([a.strip()], [b.strip()], truncation=True, return_tensors="pt")).logits for a, b in PAIRS
        ]
    return torch.softmax(torch.cat(logits), dim=1).numpy()


def scores(target: Path, **options: Any) -> np.ndarray[Any, Any]:
    with load(target, **options) as model:
        return np.array([list(answer.fields["scores"].values()) for answer in model.predict(PAIRS)])


def test_every_engine_answers_pairs_as_transformers_does(work: Path) -> None:
    assert load_manifest(work / "e").task.token_types
    expected = of_transformers(work / "r")
    assert np.abs(expected[0] - expected[1]).max() > 1e-3, "the two texts are told apart"
    np.testing.assert_allclose(scores(work / "r"), expected, atol=1e-4)
    for engine in ("onnxruntime", "openvino"):
        np.testing.assert_allclose(scores(work / "e", engine=engine, precision="fp32"), expected, atol=1e-4)
    for engine in (name for name in ("native", "openvino", "onnxruntime") if ENGINES[name].installed):
        np.testing.assert_allclose(scores(work / "e", engine=engine, precision="int8"), expected, atol=0.05)


def test_pairs_are_read_from_columns_splits_and_the_command_line(work: Path, tmp_path: Path) -> None:
    row = json.loads((work / "r" / "splits" / "test.jsonl").read_text().splitlines()[0])
    assert set(row) == {"text", "text_pair", "label", "origin"}
    for source in (work / "rows.csv", work / "r" / "splits" / "test.jsonl"):
        code, out = run("evaluate", work / "e", "--data", source)
        assert code == 0, out
    code, out = run("predict", work / "e", "--input", work / "rows.csv", "--output", tmp_path / "out.csv")
    assert code == 0, out
    assert (tmp_path / "out.csv").read_text().splitlines()[0].startswith("premise,hypothesis,label")
    code, out = run("predict", work / "e", "--json", row["text"], "--text-pair", row["text_pair"])
    assert code == 0, out
    (answer,) = json.loads(out[out.index("{") :])["results"]
    assert answer["text"] == f"{row['text']} | {row['text_pair']}"
    code, out = run("predict", work / "e", "a text alone")
    assert code == 1
    assert "is not a pair of texts" in out
    assert run("predict", work / "e", "one", "--text-pair", "two", "--text-pair", "three")[0] == 2


def test_a_server_takes_two_inputs(work: Path, tmp_path: Path) -> None:
    package(work / "e", "pairs", tmp_path, engine="onnxruntime", precision="fp32")
    config = MessageToDict(read_config(tmp_path / "pairs" / "config.pbtxt"), preserving_proto_field_name=True)
    assert [tensor["name"] for tensor in config["input"]] == ["TEXT", "TEXT_PAIR"]
    with KServeServer(InProcessModel("pairs", tmp_path / "pairs", "1", config), "127.0.0.1", 0) as server:
        model = ServedClassifier("pairs", server.url)
        found = model.scores([as_text(*pair) for pair in PAIRS])
        model.close()
    np.testing.assert_allclose(found, of_transformers(work / "r"), atol=1e-4)


def test_a_checkpoint_of_pairs_trained_elsewhere_is_exported_and_served_with_two_inputs(
    work: Path, tmp_path: Path
) -> None:
    shutil.copytree(work / "r", tmp_path / "c", ignore=shutil.ignore_patterns("manifest.json", "splits"))
    columns = ("--text-column", "premise", "--text-column", "hypothesis")
    for command in ("evaluate", "export"):  # without the columns nothing says which texts it reads
        more = ("--output-dir", tmp_path / "none") if command == "export" else ()
        code, out = run(command, tmp_path / "c", "--data", work / "rows.csv", *more)
        assert code == 1
        assert "no column is recognized as the text" in out
    code, out = run("evaluate", tmp_path / "c", "--data", work / "rows.csv", *columns)
    assert code == 2
    assert "the model reads one text, and 2 text columns are given" in out
    code, out = run("export", tmp_path / "c", "--data", work / "rows.csv", *columns, "--output-dir", tmp_path / "e")
    assert code == 0, out
    facts = load_manifest(tmp_path / "e").task
    assert (facts.pair, facts.token_types, facts.text_columns) == (True, True, ("premise", "hypothesis"))
    np.testing.assert_allclose(scores(tmp_path / "e", precision="fp32"), of_transformers(work / "r"), atol=1e-4)
    code, out = run("evaluate", tmp_path / "e", "--data", work / "rows.csv")
    assert code == 0, out
    package(tmp_path / "e", "pairs", tmp_path, engine="onnxruntime", precision="fp32")
    config = MessageToDict(read_config(tmp_path / "pairs" / "config.pbtxt"), preserving_proto_field_name=True)
    assert [tensor["name"] for tensor in config["input"]] == ["TEXT", "TEXT_PAIR"]


def test_text_columns_are_for_classifiers(make_tiny_translation: Callable[..., Path], tmp_path: Path) -> None:
    make_tiny_translation(tmp_path / "t", keep_checkpoint=tmp_path / "c")
    code, out = run("export", tmp_path / "c", "--text-column", "a", "--output-dir", tmp_path / "e")
    assert code == 2
    assert "--text-column is for classifiers" in out


@pytest.mark.parametrize("pair", [("", ""), ("a", "b"), ('"[', "\\ \n"), ("e\u0301", "\U0001f389")])
def test_a_pair_is_written_as_one_text_and_read_again(pair: tuple[str, str]) -> None:
    first, second = from_text(as_text(*pair))
    assert (first, second) == (pair[0].replace("e\u0301", "\u00e9").strip(), pair[1].strip())


@pytest.mark.parametrize("text", ["a", "[1, 2]", '["a"]', '["a", "b", "c"]', "{}", "null"])
def test_what_is_no_pair_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="is not a pair of texts"):
        from_text(text)


def test_a_model_of_single_texts_refuses_pairs(make_tiny_export: Callable[..., Path], tmp_path: Path) -> None:
    with load(make_tiny_export(tmp_path / "e")) as model, pytest.raises(UsageError, match="reads one text"):
        model.predict([("one", "other")])


def test_columns_are_joined_when_asked_and_three_only_then(
    make_tiny_checkpoint: Callable[..., Path], work: Path, tmp_path: Path
) -> None:
    columns = ("--text-column", "premise", "--text-column", "hypothesis")
    words = ("finetune", work / "c", "--train", work / "rows.csv", *columns)
    code, out = run(*words, "--text-column", "label", "--output-dir", tmp_path / "r")
    assert code == 2
    assert "--text-separator" in out
    code, out = run(*words, "--text-separator", " ; ", "--max-steps", 1, "--output-dir", tmp_path / "r")
    assert code == 0, out
    assert " ; " in json.loads((tmp_path / "r" / "splits" / "test.jsonl").read_text().splitlines()[0])["text"]


def test_a_tokenizer_without_a_separator_is_refused(
    work: Path, make_tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_tiny_checkpoint(tmp_path / "c")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    columns = ("--text-column", "premise", "--text-column", "hypothesis")
    code, out = run("finetune", folder, "--train", work / "rows.csv", *columns, "--output-dir", tmp_path / "r")
    assert code == 2
    assert "puts nothing between the two texts" in out
