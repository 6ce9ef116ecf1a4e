"""Checkpoints as users have them: right answers, or an early refusal."""

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

from deploykit.artifacts import load_manifest, write_manifest
from deploykit.cli import main
from deploykit.tasks.classification.served import ServedClassifier
from deploykit.triton.in_process import InProcessModel
from deploykit.triton.kserve import KServeServer
from deploykit.triton.repository import package, read_config


def run(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows with two labels that words determine; some texts are longer than the tiny models' limit."""
    known = [f"w{i}" for i in range(200)]  # in the vocabulary of make_tiny_checkpoint
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("rows") / "rows.csv"
    lines = ["text,label"]
    for i in range(120):
        label = draw.choice(["good", "bad"])
        words = known[:100] if label == "bad" else known[100:]
        lines.append(" ".join(draw.choice(words) for _ in range(draw.randint(1, 60 if i % 3 else 12))) + f",{label}")
    path.write_text("\n".join(lines) + "\n")
    return path


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def transformers_scores(folder: Path, texts: list[str]) -> np.ndarray[Any, Any]:
    """Return the scores by transformers, text by text."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        logits = [model(**tokenizer(text, truncation=True, return_tensors="pt")).logits for text in texts]
    return torch.softmax(torch.cat(logits), dim=1).numpy()


def predicted(folder: Path, texts: list[str]) -> np.ndarray[Any, Any]:
    from deploykit.tasks.opening import open_classifier

    return open_classifier(str(folder), url="", engine="onnxruntime", precision="fp32").scores(texts)


@pytest.mark.parametrize("side", ["left", "right"])
def test_texts_are_cut_on_the_checkpoints_side(
    make_tiny_checkpoint: Callable[..., Path], rows: Path, tmp_path: Path, side: str
) -> None:
    folder = make_tiny_checkpoint(tmp_path / "c")
    edit(folder / "tokenizer_config.json", truncation_side=side)
    code, out = run("export", folder, "--output-dir", tmp_path / "e", "--data", rows)
    assert code == 0, out
    texts = [" ".join(f"w{(7 * i + n) % 200}" for i in range(n)) for n in (3, 29, 31, 60, 100)]
    np.testing.assert_allclose(predicted(tmp_path / "e", texts), transformers_scores(folder, texts), atol=1e-4)


def test_an_export_with_other_answers_is_refused_with_both(
    make_tiny_checkpoint: Callable[..., Path], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_tiny_checkpoint(tmp_path / "c")
    from deploykit.runtime import tokenizer

    def encoded_alike(self: Any, texts: list[Any]) -> tokenizer.Encoded:
        return tokenizer.Encoded([[2, 5, 3] for _ in texts], [[0, 0, 0] for _ in texts])

    monkeypatch.setattr(tokenizer.TextTokenizer, "encode", encoded_alike)
    code, out = run("export", folder, "--output-dir", tmp_path / "e", "--data", rows)
    assert code == 1
    assert "answers differ from PyTorch's" in out
    assert "PyTorch gives 'bad' (" in out or "PyTorch gives 'good' (" in out
    assert not (tmp_path / "e").exists()


def test_fine_tuning_keeps_the_label_order_of_a_trained_head(
    make_tiny_checkpoint: Callable[..., Path], rows: Path, tmp_path: Path
) -> None:
    folder = make_tiny_checkpoint(tmp_path / "c")
    names = {"id2label": {"0": "good", "1": "bad"}, "label2id": {"good": 0, "bad": 1}}
    edit(folder / "config.json", **names)
    words = ("--train", rows, "--max-steps", 1, "--learning-rate", 1e-12, "--per-device-train-batch-size", 4)
    code, out = run("finetune", folder, *words, "--output-dir", tmp_path / "r")
    assert code == 0, out
    assert json.loads((tmp_path / "r" / "config.json").read_text())["id2label"] == names["id2label"]
    texts = ["w1 w2", "w150 w151 w152"]
    np.testing.assert_allclose(
        transformers_scores(tmp_path / "r", texts), transformers_scores(folder, texts), atol=1e-4
    )


@pytest.mark.parametrize("lora", [(), ("--lora-r", 2)])
def test_a_head_for_other_labels_is_replaced_with_a_message(
    make_tiny_checkpoint: Callable[..., Path], rows: Path, tmp_path: Path, lora: tuple[object, ...]
) -> None:
    folder = make_tiny_checkpoint(tmp_path / "c")
    edit(folder / "config.json", id2label={"0": "ham", "1": "spam"}, label2id={"ham": 0, "spam": 1})
    words = ("--train", rows, "--max-steps", 1, "--learning-rate", 1e-12, "--per-device-train-batch-size", 4)
    code, out = run("finetune", folder, *words, *lora, "--output-dir", tmp_path / "r")
    assert code == 0, out
    assert "answers ham, spam; it is replaced by a new head, for bad, good" in out
    if lora:  # the new head is in the adapter, and so the same at each load
        assert run("export", tmp_path / "r", "--output-dir", tmp_path / "e")[0] == 0
        return
    text = ["w1 w2 w3"]
    difference = np.abs(transformers_scores(tmp_path / "r", text) - transformers_scores(folder, text)).max()
    assert difference > 1e-3


def test_a_regression_is_trained_measured_exported_and_answers_numbers(
    make_tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    draw = random.Random(1)
    lines = []
    for _ in range(200):
        value = draw.random()
        words = ["w1" if draw.random() < value else "w150" for _ in range(12)]
        lines.append(f"{' '.join(words)} w{len(lines) % 40 + 20},{words.count('w1') / 4}")
    table = tmp_path / "rows.csv"
    table.write_text("text,stars\n" + "\n".join(lines) + "\n")
    folder = make_tiny_checkpoint(tmp_path / "c", initializer_range=0.1)
    words = ("--num-train-epochs", 12, "--learning-rate", 2e-3, "--per-device-train-batch-size", 8)
    code, out = run("finetune", folder, "--train", table, "--regression", *words, "--output-dir", tmp_path / "r")
    assert code == 0, out
    assert "Pearson" in out
    assert "is replaced by a new head" in out
    metrics = json.loads((tmp_path / "r" / "metrics.json").read_text())["test"]
    assert set(metrics) == {"mae", "rmse", "pearson", "spearman", "intervals"}
    assert metrics["pearson"] > 0.5, "it learned something"
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    assert (config["problem_type"], config["id2label"]) == ("regression", {"0": "stars"})
    code, out = run("export", tmp_path / "r", "--output-dir", tmp_path / "e", "--int8", "--max-drop", 5)
    assert code == 0, out
    assert "Pearson" in out
    code, out = run("predict", tmp_path / "e", "--precision", "fp32", "--json", "w1 w1 w1", "w150 w150")
    assert code == 0, out
    high, low = (float(row["label"]) for row in json.loads(out[out.index("{") :])["results"])
    assert high > low
    code, out = run("evaluate", tmp_path / "e", "--data", table, "--json")
    assert code == 0, out
    assert json.loads(out[out.index("{") :])["metrics"]["rmse"] < 2


@pytest.mark.parametrize(
    ("fields", "labels"),
    [
        ({"problem_type": "multi_label_classification"}, "good|bad"),
        ({"problem_type": None, "id2label": {"0": "stars"}, "label2id": {"stars": 0}}, "stars"),
        ({"problem_type": "regression", "id2label": {"0": "stars"}, "label2id": {"stars": 0}}, "1.5"),
    ],
)
def test_what_the_config_says_of_the_head_is_honoured(
    make_tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    fields: dict[str, Any],
    labels: str,
) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import pipeline

    folder = make_tiny_checkpoint(tmp_path / "c")
    edit(folder / "config.json", **fields)
    if "id2label" in fields:
        weights = load_file(folder / "model.safetensors")
        for name in ("classifier.weight", "classifier.bias"):
            weights[name] = weights[name][:1].clone()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "".join(f"w{i} w{i + 1},{labels}\n" for i in range(12)))
    code, out = run("export", folder, "--output-dir", tmp_path / "e", "--data", rows)
    assert code == 0, out
    assert ("the answer is the probability of 'stars'" in caplog.text) == (labels == "stars")
    (answers,) = pipeline("text-classification", folder, top_k=None)(["w1 w2"])
    expected = {answer["label"]: answer["score"] for answer in answers}
    order = json.loads((folder / "config.json").read_text())["id2label"].values()
    found = predicted(tmp_path / "e", ["w1 w2"])
    np.testing.assert_allclose(found, [[expected[label] for label in order]], atol=1e-5)


def test_a_text_without_tokens_fails_alone_when_it_is_served(
    make_tiny_export: Callable[..., Path], tmp_path: Path
) -> None:
    """GPT-2's tokenizer makes no token of an empty text."""
    exported = make_tiny_export(tmp_path / "e")
    edit(exported / "tokenizer.json", post_processor=None)
    write_manifest(exported, "export", load_manifest(exported, verify=False).task, inputs="no special tokens")
    package(exported, "m", tmp_path, engine="onnxruntime", precision="fp32")
    config = MessageToDict(read_config(tmp_path / "m" / "config.pbtxt"), preserving_proto_field_name=True)
    with KServeServer(InProcessModel("m", tmp_path / "m", "1", config), "127.0.0.1", 0) as server:
        model = ServedClassifier("m", server.url)
        first, empty, last = model.predict_rows(["w1", "", "w2 w3"])
        (alone,) = model.predict_rows(["w2 w3"])
        model.close()
    assert (first.error, last.error) == ("", "")
    assert "has no token" in empty.error
    np.testing.assert_array_equal(last.scores, alone.scores)


def test_a_label_that_is_no_number_is_named(
    make_tiny_checkpoint: Callable[..., Path], rows: Path, tmp_path: Path
) -> None:
    folder = make_tiny_checkpoint(tmp_path / "c")
    code, out = run("finetune", folder, "--train", rows, "--regression", "--output-dir", tmp_path / "r")
    assert code == 1
    assert "is not a number" in out
    assert "rows.csv:" in out


def test_hidden_states_beside_the_logits_and_outputs_without_names_do_no_harm(
    make_tiny_checkpoint: Callable[..., Path], rows: Path, tmp_path: Path
) -> None:
    folder = make_tiny_checkpoint(tmp_path / "c")
    edit(folder / "config.json", output_hidden_states=True, return_dict=False)
    code, out = run("finetune", folder, "--train", rows, "--max-steps", 1, "--output-dir", tmp_path / "r")
    assert code == 0, out
    assert run("export", tmp_path / "r", "--output-dir", tmp_path / "e")[0] == 0


def test_a_model_whose_answers_padding_changes_is_refused_before_training(
    make_tiny_checkpoint: Callable[..., Path], rows: Path, tmp_path: Path
) -> None:
    folder = make_tiny_checkpoint(tmp_path / "c", "convbert")
    code, out = run("finetune", folder, "--train", rows, "--output-dir", tmp_path / "r")
    assert code == 2
    assert "models of type convbert answer otherwise when a text is padded" in out
    assert "training on" not in out.split("error:")[1]
    assert not (tmp_path / "r").exists()
    code, out = run("predict", folder, "good")
    assert code == 2
    assert "models of type convbert answer otherwise when a text is padded" in out
    shutil.rmtree(folder)


def test_an_adapter_is_refused_as_a_base_to_train_on(
    make_tiny_checkpoint: Callable[..., Path], rows: Path, tmp_path: Path
) -> None:
    folder = make_tiny_checkpoint(tmp_path / "c")
    words = ("--train", rows, "--max-steps", 1)
    code, out = run("finetune", folder, *words, "--lora-r", 2, "--output-dir", tmp_path / "r")
    assert code == 0, out
    code, out = run("finetune", tmp_path / "r", *words, "--output-dir", tmp_path / "again")
    assert code == 2
    assert f"is an adapter of {folder}" in out
    assert "merge_and_unload" in out


def test_a_token_without_an_embedding_is_named_before_training_and_export(
    make_tiny_checkpoint: Callable[..., Path], rows: Path, tmp_path: Path
) -> None:
    folder = make_tiny_checkpoint(tmp_path / "c")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {"extra": 204, "another": 205}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    words = ("--output-dir", tmp_path / "o")
    for command in (("finetune", folder, "--train", rows, *words), ("export", folder, "--data", rows, *words)):
        code, out = run(*command)
        assert code == 1
        assert "gives 'extra' the id 204, and the model has embeddings for ids below 204; 1 more" in out


def test_an_end_token_that_the_model_does_not_read_may_be_beyond_its_vocabulary(
    make_tiny_checkpoint: Callable[..., Path], rows: Path, tmp_path: Path
) -> None:
    """A ModernBERT with a vocabulary of its own keeps its config's 50282."""
    folder = make_tiny_checkpoint(tmp_path / "c")
    edit(folder / "config.json", eos_token_id=50282)
    code, out = run("export", folder, "--output-dir", tmp_path / "e", "--data", rows)
    assert code == 0, out


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("config.json", b"{", "config.json: is not a JSON object"),
        ("config.json", b"[]", "config.json: is not a JSON object"),
        ("config.json", b'{"model_type": "\xe9"}', "config.json: is not a JSON object"),
        ("tokenizer_config.json", {"model_max_length": "32"}, "model_max_length is '32', which is not a number"),
        ("tokenizer_config.json", {"model_max_length": 2}, "reads 2 tokens, and 2 of a text are special ones"),
        ("adapter_config.json", b'{"base_model_name_or_path": "org/base"}', "if its weights are merged, remove adapter_config"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_right_are_refused_by_name(
    make_tiny_checkpoint: Callable[..., Path], tmp_path: Path, name: str, content: bytes | dict[str, Any], says: str
) -> None:
    folder = make_tiny_checkpoint(tmp_path / "c")
    if isinstance(content, dict):
        edit(folder / name, **content)
    else:
        (folder / name).write_bytes(content)
    code, out = run("predict", folder, "w1 w2")
    assert code in (1, 2)
    assert says in out
