"""Exports open in optimum-onnx, in a separate virtual environment because it needs transformers 4."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import deploykit
from deploykit.artifacts import load_manifest
from deploykit.graphs.export_options import ExportOptions
from deploykit.stages.export import export
from deploykit.tasks.classification.checkpoint import TorchClassifier
from deploykit.tasks.classification.predictor import Classifier
from deploykit.tasks.opening import open_classifier
from deploykit.tasks.registry import task_of_checkpoint

PYTHON = Path(os.environ.get("OPTIMUM_VENV", "/tmp/deploykit-optimum")) / "bin" / "python"
TEXTS = [" ".join(f"w{(7 * i + 13 * j) % 200}" for j in range(1 + i % 9)) for i in range(40)]

# Without VNNI, INT8 kernels saturate at 16 bits unless this entry is set; deploykit sets it in the same case.
_ASK = """
import json, sys
from pathlib import Path
import onnxruntime
from optimum.onnxruntime import ORTModelForSequenceClassification
from transformers import AutoTokenizer
folder, texts = sys.argv[1], json.load(sys.stdin)
options = onnxruntime.SessionOptions()
if "vnni" not in Path("/proc/cpuinfo").read_text():
    options.add_session_config_entry("session.x64quantprecision", "1")
tokenizer = AutoTokenizer.from_pretrained(folder)
answers = {}
for file in ("model.onnx", "model.u8s8.onnx", "model.s8s8.onnx"):
    model = ORTModelForSequenceClassification.from_pretrained(folder, file_name=file, session_options=options)
    inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    answers[file] = model(**inputs).logits.softmax(dim=-1).tolist()
print(json.dumps({"answers": answers, "labels": model.config.id2label}))
"""


@pytest.fixture(scope="module")
def exported(make_tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a tiny BERT, in fp32 and INT8."""
    folder = tmp_path_factory.mktemp("optimum")
    checkpoint = make_tiny_checkpoint(folder / "checkpoint")
    rows = folder / "rows.jsonl"
    labels = ("bad", "good")
    rows.write_text("".join(json.dumps({"text": t, "label": labels[i % 2]}) + "\n" for i, t in enumerate(TEXTS)))
    options = ExportOptions(int8=True, calibration_data=str(rows), data=str(rows), max_drop=100)
    return export(checkpoint, folder / "export", options, say=lambda line: None).path


def test_an_export_has_the_files_that_optimum_lays_out(exported: Path) -> None:
    files = set(load_manifest(exported, "export").files)
    assert {"model.onnx", "config.json", "tokenizer.json", "tokenizer_config.json"} <= files
    config = json.loads((exported / "config.json").read_text())
    assert (config["model_type"], config["id2label"]) == ("bert", {"0": "bad", "1": "good"})
    assert not list(exported.glob("*.safetensors.index.json"))


def test_an_export_with_a_config_is_not_taken_for_a_checkpoint(exported: Path) -> None:
    assert task_of_checkpoint(exported).name == "classification"
    opened = open_classifier(str(exported), url="", engine="onnxruntime", precision="fp32")
    assert isinstance(opened, Classifier)
    assert not isinstance(opened, TorchClassifier)


def test_optimum_opens_each_graph_and_gives_the_same_answers(exported: Path) -> None:
    if not PYTHON.is_file():
        pytest.skip(f"no optimum-onnx at {PYTHON}: `make interop` makes that environment, from a package registry")
    done = subprocess.run(
        (str(PYTHON), "-c", _ASK, str(exported)), input=json.dumps(TEXTS), capture_output=True, text=True, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["labels"] == {"0": "bad", "1": "good"}
    wanted = {"model.onnx": ("onnxruntime", "fp32"), "model.u8s8.onnx": ("onnxruntime", "int8"),
              "model.s8s8.onnx": ("openvino", "int8")}  # fmt: skip
    for file, (engine, precision) in wanted.items():
        ours = open_classifier(str(exported), url="", engine=engine, precision=precision).scores(TEXTS)
        theirs = np.array(told["answers"][file], np.float32)
        # The S8/S8 graph is for another engine, which rounds differently.
        limit = 1e-4 if precision == "fp32" else 2e-3 if engine == "onnxruntime" else 0.05
        assert np.abs(ours - theirs).max() < limit, file
        assert (ours.argmax(axis=1) == theirs.argmax(axis=1)).mean() >= (1.0 if engine == "onnxruntime" else 0.95)


_TRANSLATE = """
import json, sys
from pathlib import Path
import onnxruntime
from optimum.onnxruntime import ORTModelForSeq2SeqLM
from transformers import AutoTokenizer
folder, texts = sys.argv[1], json.load(sys.stdin)
options = onnxruntime.SessionOptions()
if "vnni" not in Path("/proc/cpuinfo").read_text():
    options.add_session_config_entry("session.x64quantprecision", "1")
tokenizer = AutoTokenizer.from_pretrained(folder)
answers = {}
for kind in ("", "_quantized"):
    names = {f"{part}_file_name": f"{file}{kind}.onnx" for part, file in (
        ("encoder", "encoder_model"), ("decoder", "decoder_model"), ("decoder_with_past", "decoder_with_past_model"))}
    model = ORTModelForSeq2SeqLM.from_pretrained(folder, use_merged=False, session_options=options, **names)
    found = model.generate(**tokenizer(texts, padding=True, return_tensors="pt"), num_beams=1)
    answers[kind] = tokenizer.batch_decode(found, skip_special_tokens=True)
print(json.dumps(answers))
"""


@pytest.mark.skipif(not PYTHON.is_file(), reason=f"no optimum-onnx at {PYTHON}: `make interop` makes that environment")
def test_optimum_opens_a_translator_and_gives_the_same_translations(tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.tsv"
    things, deeds = ("file", "folder", "user", "page"), {"Open": "Ouvrir", "Close": "Fermer", "Find": "Trouver"}
    rows = [
        f"{en} the {thing} {i}.\t{fr} le {thing} {i}."
        for en, fr in deeds.items()
        for thing in things
        for i in range(20)
    ]
    pairs.write_text("\n".join(["en\tfr", *rows]) + "\n", encoding="utf-8")
    languages = {"source_lang": "en", "target_lang": "fr"}
    run = deploykit.finetune(
        None, train=str(pairs), task="translation", from_config="marian-tiny", output_dir=tmp_path / "run", max_steps=150,
        eval_steps=150, max_length=32, **languages,
    )  # fmt: skip
    done = deploykit.export(run.path, tmp_path / "export", int8=True, optimum=True, max_drop=100)
    sources = [row.split("\t")[0] for row in rows[::9]]
    process = subprocess.run(
        (str(PYTHON), "-c", _TRANSLATE, str(done.path / "optimum")), input=json.dumps(sources), capture_output=True,
        text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    theirs = json.loads(process.stdout.splitlines()[-1])
    with deploykit.load(done.path, engine="onnxruntime", precision="fp32") as model:
        ours = [answer.text for answer in model.translate(sources, num_beams=1)]
    assert theirs[""] == ours
    assert np.mean([a == b for a, b in zip(theirs["_quantized"], ours)]) > 0.5
