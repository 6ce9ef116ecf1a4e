"""Question answering in all stages on a small random model: train, export, package, serve, query."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http as triton
from killed_run import kill_at_step
from safetensors.torch import load_file, save_file
from tiny_answerer import WORDS, squad, write_checkpoint, write_squad

from deploykit.api import load
from deploykit.artifacts import SAMPLES, load_manifest, write_manifest
from deploykit.errors import RequestError, UsageError
from deploykit.runtime.engines.native.loader import lacks
from deploykit.tasks.opening import open_for, open_predictor
from deploykit.tasks.question_answering.rows import read_rows
from deploykit.tasks.question_answering.served import ServedAnswerer
from deploykit.tasks.registry import task_of
from deploykit.text import printable
from deploykit.triton.server import TritonServer

Deploykit = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of rows: some questions have no answer, some answers have a wrong position."""
    folder = tmp_path_factory.mktemp("qa")
    content = squad(contexts=60, questions=2)
    for i, paragraph in enumerate(content["data"][0]["paragraphs"]):
        paragraph["qas"].append({"id": f"none-{i}", "question": "what none ?", "answers": [], "is_impossible": True})
    content["data"][0]["paragraphs"][0]["qas"][0]["answers"][0]["text"] = "nowhere"
    (folder / "squad.json").write_text(json.dumps(content))
    write_checkpoint(folder / "base", "bert")
    return folder


@pytest.fixture(scope="module")
def run(deploykit: Deploykit, folder: Path) -> Path:
    done = deploykit(
        "finetune", "--task", "question-answering", folder / "base", "--train", folder / "squad.json",
        "--output-dir", folder / "run", "--max-length", 48, "--doc-stride", 12, "--max-steps", 240, "--eval-steps", 120,
        "--learning-rate", 3e-3, "--per-device-train-batch-size", 16, "--validation-fraction", 0.2, "--test-fraction", 0.2,
        "--early-stopping-patience", 2, "--lr-scheduler-type", "constant",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "whose answer does not stand at its place" in done.err
    assert "threshold for no answer" in done.err
    return folder / "run"


@pytest.fixture(scope="module")
def exported(deploykit: Deploykit, run: Path, folder: Path) -> Path:
    done = deploykit(
        "export", run, "--output-dir", folder / "export", "--int8", "--max-drop", 100, "--calibration-rows", 8
    )
    assert done.code == 0, done.err
    assert "100% equal spans" in done.err
    return folder / "export"


@pytest.fixture(scope="module")
def server(deploykit: Deploykit, exported: Path, folder: Path) -> Iterator[TritonServer]:
    served = [("qa", "onnxruntime", "fp32"), ("qa-openvino", "openvino", "fp32")]
    for name, engine, precision in (*served, *([] if lacks() else [("qa-native", "native", "int8")])):
        words = (
            "--name",
            name,
            "--engine",
            engine,
            "--precision",
            precision,
            "--model-repository",
            folder / "repository",
        )
        done = deploykit("package", exported, *words)
        assert done.code == 0, done.err
    with TritonServer(folder / "repository", http_port=0, grpc_port=0, metrics_port=0) as server:
        yield server


def _pairs(path: Path) -> list[tuple[str, str]]:
    return [(row.question or "", row.context or "") for row in read_rows(str(path))]


def test_a_run_has_the_documented_files_and_metrics(run: Path, deploykit: Deploykit) -> None:
    manifest = load_manifest(run, "checkpoint")
    assert manifest.task.name == "question-answering"
    metrics = json.loads((run / "metrics.json").read_text())["test"]
    assert {"exact_match", "f1", "intervals", "has_answer", "no_answer", "best_f1_threshold"} <= set(metrics)
    assert metrics["f1"] > 0.8, "it learned"
    assert metrics["no_answer"]["f1"] > 0.8
    contexts = {
        name: {json.loads(line)["context"] for line in (run / "splits" / f"{name}.jsonl").read_text().splitlines()}
        for name in ("train", "validation", "test")
    }
    assert not contexts["train"] & (contexts["validation"] | contexts["test"])
    assert not contexts["validation"] & contexts["test"]
    card = (run / "README.md").read_text()
    assert "pipeline_tag: question-answering" in card
    assert "| all |" in card
    code, out, err = deploykit("inspect", run)
    assert code == 0, err
    assert "no answer above log-odds" in out
    code, out, err = deploykit("finetune", "--config", run / "finetune.toml", "--output-dir", run, "--json")
    assert code == 0, err
    assert json.loads(out)["reused"]


def test_lora_trains_an_adapter_that_answers(deploykit: Deploykit, folder: Path) -> None:
    data = write_squad(folder / "v1.json", contexts=6, questions=2)
    done = deploykit(
        "finetune", "--task", "question-answering", folder / "base", "--train", data, "--output-dir", folder / "lora",
        "--max-length", 48, "--doc-stride", 8, "--max-steps", 2, "--lora-r", 2, "--whole-words", "no",
    )  # fmt: skip
    assert done.code == 0, done.err
    predictor: Any = open_predictor(str(folder / "lora"), url="")
    assert predictor.task.whole_words is False
    assert predictor.task.no_answer_threshold is None
    assert predictor.answer("after w1 ?", "w0 w1 w2")[0].text


def test_a_killed_run_continues_to_the_same_end(deploykit: Deploykit, folder: Path) -> None:
    words = ("finetune", "--task", "question-answering", folder / "base", "--train", folder / "squad.json",
             "--max-length", 48, "--doc-stride", 12, "--max-steps", 6, "--eval-steps", 2)  # fmt: skip
    code, _, err = deploykit(*words, "--output-dir", folder / "whole")
    assert code == 0, err
    kill_at_step(5, *words, "--output-dir", folder / "killed")
    code, _, err = deploykit(*words, "--output-dir", folder / "killed")
    assert code == 0, err
    assert "continuing the unfinished run" in err
    weights = [(folder / name / "model.safetensors").read_bytes() for name in ("killed", "whole")]
    assert weights[0] == weights[1], "bit for bit"


def test_every_engine_and_precision_answers_as_the_table_says(
    exported: Path, folder: Path, deploykit: Deploykit
) -> None:
    manifest = load_manifest(exported, "export")
    lines = {(line["engine"], line["precision"]): line for line in manifest.metrics["accuracy_table"]}
    assert {("pytorch", "fp32"), ("onnxruntime", "fp32"), ("onnxruntime", "int8"), ("openvino", "int8")} <= set(lines)
    assert lines["onnxruntime", "fp32"]["agreement"] == 1
    assert lines["openvino", "int8"]["int8_kernels"] > 0
    native = [] if lacks() else [("native", "int8")]
    assert all(lines[each]["int8_kernels"] == 8 for each in native)
    test = folder / "run" / "splits" / "test.jsonl"
    for engine, precision in (("onnxruntime", "fp32"), ("openvino", "int8"), *native):
        code, out, err = deploykit(
            "evaluate", exported, "--data", test, "--engine", engine, "--precision", precision, "--json"
        )
        assert code == 0, err
        assert json.loads(out)["metrics"]["f1"] == pytest.approx(lines[engine, precision]["f1"])


def test_int8_that_loses_f1_leaves_layers_in_fp32(run: Path, folder: Path, deploykit: Deploykit) -> None:
    """Two values of each attention are so large that one quantization step exceeds all others."""
    ruined = folder / "ruined"
    ruined.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(run / name, ruined / name)
    weights = load_file(run / "model.safetensors")
    for layer in range(2):
        block = f"bert.encoder.layer.{layer}.attention"
        for name in ("weight", "bias"):
            weights[f"{block}.self.value.{name}"][[1, 20]] *= 3e4
        weights[f"{block}.output.dense.weight"][:, [1, 20]] /= 3e4
    save_file(weights, ruined / "model.safetensors", metadata={"format": "pt"})
    rows = ("--data", run / "splits" / "test.jsonl", "--calibration-data", run / "splits" / "train.jsonl")
    code, out, err = deploykit(
        "export", ruined, "--output-dir", folder / "held", "--int8", "--max-drop", 3, *rows, "--json"
    )
    assert code == 0, err
    record = json.loads(out)
    f1 = {(line["engine"], line["precision"]): line["f1"] for line in record["accuracy"]}
    for engine in ("onnxruntime", "openvino"):
        assert record["quantization"]["search"][engine]["kept"], "it lost more, with all layers in INT8"
        assert f1[engine, "int8"] > f1[engine, "fp32"] - 0.03


def test_tensorrt_engines_are_built_as_for_classifiers(run: Path, folder: Path, deploykit: Deploykit) -> None:
    pytest.importorskip("tensorrt_rtx", reason="the extra rtx is not installed")
    code, out, err = deploykit(
        "export", run, "--output-dir", folder / "trt", "--int8", "--max-drop", 100, "--calibration-rows", 8, "--trt",
        "--builder", "rtx", "--precision", "int8", "--json",
    )  # fmt: skip
    assert code == 0, err
    (engine,) = json.loads(out)["engines"]
    assert (engine["precision"], engine["int8_gemms"] > 0) == ("int8", True)


def test_the_graph_has_optimums_names(exported: Path) -> None:
    import onnx

    graph = onnx.load(exported / "model.onnx").graph
    assert [i.name for i in graph.input] == ["input_ids", "attention_mask", "token_type_ids"]
    assert [o.name for o in graph.output] == ["start_logits", "end_logits"]
    assert json.loads((exported / "config.json").read_text())["architectures"] == ["BertForQuestionAnswering"]


def test_a_served_model_gives_the_spans_of_pytorch(server: TritonServer, run: Path, folder: Path) -> None:
    reference: Any = open_predictor(str(run), url="")
    pairs = [*_pairs(folder / "squad.json"), ("w1 ?", "😀 w1 " * 90), ("after w3 ?", "w3 e\u0301 w4\r\nw5"),
             ("w3 ?", "<p>w3 &amp; w4</p>"), ("w3 ?", "w1\x00w3\x00 w4"), ("w3 ?", "１２３，它在北京。w3")]  # fmt: skip
    expected = reference.try_all(pairs, top_k=3)
    for name in ("qa", "qa-openvino"):
        served: Any = open_for("question-answering", name, url=server.urls.http)
        assert isinstance(served, ServedAnswerer)
        answered = served.try_all(pairs, top_k=3)
        for (_, context), theirs, ours in zip(pairs, expected, answered):
            assert [(s.text, s.start, s.end) for s in ours.spans[:1]] == [
                (s.text, s.start, s.end) for s in theirs.spans[:1]
            ]
            assert [s.score for s in ours.spans] == pytest.approx([s.score for s in theirs.spans], abs=1e-3)
            assert all(printable(context)[s.start : s.end] == s.text for s in ours.spans)
            assert ours.none == pytest.approx(theirs.none, abs=1e-2)
        served.close()


@pytest.mark.skipif(lacks() is not None, reason=f"the engine native does not run here: {lacks()}")
def test_native_answers_windows_of_many_questions_as_one_alone(
    server: TritonServer, exported: Path, folder: Path
) -> None:
    local: Any = open_predictor(str(exported), url="", engine="native")
    pairs = [*_pairs(folder / "squad.json"), ("w1 ?", "w1 😀 " * 200), ("after w3 ?", "w3 e\u0301 w4\r\nw5")]
    together = local.try_all(pairs, top_k=3)
    assert [local.try_all([pair], top_k=3)[0] for pair in pairs[-5:]] == together[-5:], "in any company"
    with contextlib.closing(ServedAnswerer("qa-native", server.urls.http)) as served:
        for ours, theirs in zip(served.try_all(pairs, top_k=3), together, strict=True):
            assert [(s.text, s.start, s.end) for s in ours.spans] == [(s.text, s.start, s.end) for s in theirs.spans]


def _ask(server: TritonServer, questions: list[str], contexts: list[str], **parameters: Any) -> dict[str, Any]:
    client = triton.InferenceServerClient(server.urls.http.removeprefix("http://"))
    inputs = []
    for name, values in (("QUESTION", questions), ("CONTEXT", contexts)):
        inputs.append(triton.InferInput(name, [len(values), 1], "BYTES"))
        inputs[-1].set_data_from_numpy(np.array([[value.encode()] for value in values], np.object_))
    names = ("ANSWER", "START", "END", "SCORE", "ERROR", "TOP_ANSWERS", "TOP_STARTS")
    answer = client.infer("qa", inputs, parameters=parameters or None)
    client.close()
    return {name: answer.as_numpy(name) for name in names}


def test_any_client_of_triton_asks_with_a_context_once_for_many_questions(server: TritonServer) -> None:
    long = " ".join(WORDS)
    once = _ask(server, ["after w1 ?", "after w9 ?", "after w3 ?"], [long, "", "w3 w4"], top_k=4)
    twice = _ask(server, ["after w1 ?", "after w9 ?", "after w3 ?"], [long, long, "w3 w4"], top_k=4)
    assert once["ANSWER"].tolist() == twice["ANSWER"].tolist()
    assert once["TOP_STARTS"].tolist() == twice["TOP_STARTS"].tolist()
    assert once["TOP_ANSWERS"].shape == (3, 4)
    for row, context in enumerate((long, long, "w3 w4")):
        start, end = once["START"][row, 0], once["END"][row, 0]
        assert context[start:end].encode() == once["ANSWER"][row, 0]
    bad = _ask(server, ["", "after w3 ?", "after w3 ?"], ["w3 w4", "w3 w4", " "])
    assert [error.decode() for error in bad["ERROR"].reshape(-1)] == [
        "the question is empty",
        "",
        "the context is empty",
    ]
    with pytest.raises(Exception, match="top_k must be an integer"):
        _ask(server, ["w1"], ["w1"], top_k=0)


def test_a_client_of_grpc_asks_too(server: TritonServer) -> None:
    client = tritonclient.grpc.InferenceServerClient(server.urls.grpc)
    inputs = []
    for name, values in (("QUESTION", ["after w1 ?", "after w9 ?"]), ("CONTEXT", [" ".join(WORDS), ""])):
        inputs.append(tritonclient.grpc.InferInput(name, [2, 1], "BYTES"))
        inputs[-1].set_data_from_numpy(np.array([[value.encode()] for value in values], np.object_))
    answer = client.infer("qa", inputs, parameters={"top_k": 2})
    client.close()
    expected = _ask(server, ["after w1 ?", "after w9 ?"], [" ".join(WORDS), ""], top_k=2)
    assert answer.as_numpy("ANSWER").tolist() == expected["ANSWER"].tolist()
    assert answer.as_numpy("TOP_STARTS").tolist() == expected["TOP_STARTS"].tolist()


def test_a_caller_chooses_the_threshold_for_no_answer(
    server: TritonServer, run: Path, folder: Path, deploykit: Deploykit
) -> None:
    (folder / "short.txt").write_text("w0 w1 w2")
    for target, where in ((run, ()), ("qa", ("--url", server.urls.http))):
        for threshold, answered in ((-1000, False), (1000, True)):
            code, out, err = deploykit(
                "answer", target, "--question", "after w1 ?", "--context", folder / "short.txt", *where, "--json",
                "--no-answer-threshold", threshold,
            )  # fmt: skip
            assert code == 0, err
            (record,) = json.loads(out)["results"]
            assert bool(record["answer"]) == answered
    with pytest.raises(Exception, match="no_answer_threshold must be a number, not 'much'"):
        _ask(server, ["w1"], ["w1"], no_answer_threshold="much")


def test_python_asks_the_loaded_model(server: TritonServer, exported: Path) -> None:
    pairs = [("after w1 ?", "w0 w1 w2"), ("after w3 ?", "w3 w4")]
    with load(exported, engine="onnxruntime", precision="fp32") as local, load("qa", url=server.urls.http) as served:
        for ours, theirs in zip(local.answer(pairs, top_k=2), served.answer(pairs, top_k=2), strict=True):
            assert ours.fields["answer"] == theirs.fields["answer"]
            assert len(ours.fields["answers"]) == 2


def test_refused_questions_have_an_error(server: TritonServer, folder: Path) -> None:
    served = ServedAnswerer("qa", server.urls.http)
    results = served.try_all([(" ".join(WORDS[:80]), "w1"), ("w1 ?", "w2"), ("w1 ?", "")])
    assert "80 tokens" in str(results[0])
    assert results[2].message == "the context is empty"  # type: ignore[union-attr]
    served.close()
    with pytest.raises(UsageError, match="answers questions, it does not classify"):
        open_for("classification", "qa", url=server.urls.http)
    with pytest.raises(RequestError):
        open_for("question-answering", "nothing-here", url=server.urls.http)


def test_answer_evaluate_and_bench_take_the_served_model(
    server: TritonServer, folder: Path, deploykit: Deploykit
) -> None:
    (folder / "context.txt").write_bytes("Überall w3 w4\r\nund w5".encode())
    where = ("--url", server.urls.http)
    code, out, err = deploykit(
        "answer", "qa", "--question", "after w3 ?", "--question", "after w5 ?", "--context", folder / "context.txt",
        "--top-k", 2, *where, "--json",
    )  # fmt: skip
    assert code == 0, err
    context = "Überall w3 w4\r\nund w5"
    for record in json.loads(out)["results"]:
        assert context[record["start"] : record["end"]] == record["answer"]
        assert len(record["answers"]) == 2
    test = folder / "run" / "splits" / "test.jsonl"
    code, out, err = deploykit("evaluate", "qa", "--data", test, *where, "--json")
    assert code == 0, err
    kept = json.loads((folder / "run" / "metrics.json").read_text())["test"]
    assert json.loads(out)["metrics"]["f1"] == pytest.approx(kept["f1"], abs=1e-6)
    code, out, err = deploykit(
        "bench", "qa", "--data", test, *where, "--rounds", 1, "--seconds", 0.2, "--max-concurrency", 2,
        "--output", folder / "bench.json", "--json",
    )  # fmt: skip
    assert code == 0, err
    (candidate,) = json.loads(out)["candidates"]
    assert candidate["metrics"]["f1"] == pytest.approx(kept["f1"], abs=1e-6)


def test_a_file_is_answered_in_order_and_shown_wrong_ones_first(run: Path, folder: Path, deploykit: Deploykit) -> None:
    rows = [{"question": "after w1 ?", "context": "w0 w1 w2"}, {"question": "", "context": "w1"}, {"context": "w1"},
            {"question": "after <b>w3</b> ?", "context": "<script>w3</script> w4"}, {"question": "q", "context": ["w1"]},
            {"question": "after w1 ?", "context": "w0 w1 w2", "answer": "w2", "answer_start": 99}]  # fmt: skip
    (folder / "ask.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, _, err = deploykit("answer", run, "--input", folder / "ask.jsonl", "--output", folder / "out.jsonl")
    assert code == 1, err
    assert "ask.jsonl:2: the question is empty" in err
    answered = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert [("answer" in a, a.get("error")) for a in answered] == [
        (True, None), (False, "the question is empty"), (False, "the question is missing"), (True, None),
        (False, "context is a list, not a text"), (True, None),
    ]  # fmt: skip
    labelled = [{"question": "<i>q</i>", "context": "<b>w1</b> w2", "answer": "w2", "answer_start": 10}]
    labelled += [
        {"question": f"after w{i} ?", "context": " ".join(WORDS[i : i + 9]), "answer": WORDS[i + 1]} for i in range(9)
    ]
    (folder / "labelled.jsonl").write_text("\n".join(map(json.dumps, labelled)))
    code, _, err = deploykit("answer", run, "--input", folder / "labelled.jsonl", "--page", folder / "page.html")
    assert code == 0, err
    page = (folder / "page.html").read_text()
    assert "&lt;i&gt;q&lt;/i&gt;" in page
    assert "<i>" not in page
    overlaps = [float(f1) for f1 in re.findall(r"<small>F1 ([\d.]+)", page)]
    assert overlaps == sorted(overlaps)
    assert len(overlaps) == 10
    assert "<u>" in page


def test_predict_answers_as_answer_does(run: Path, folder: Path, deploykit: Deploykit) -> None:
    context = "w0 e\u0301 w1 w2"
    (folder / "one.txt").write_text(context)
    text = json.dumps({"question": "after w1 ?", "context": context}, ensure_ascii=False)
    code, out, err = deploykit("predict", run, text, "--json")
    assert code == 0, err
    (predicted,) = json.loads(out)["results"]
    code, out, err = deploykit("answer", run, "--question", "after w1 ?", "--context", folder / "one.txt", "--json")
    assert code == 0, err
    (answered,) = json.loads(out)["results"]
    assert predicted["text"] == "after w1 ?"
    assert predicted | {"origin": ""} == answered | {"origin": ""}
    code, out, err = deploykit(
        "answer", run, "--question", "after w1 ?", "--question", "after w0 ?", "--context", folder / "one.txt"
    )
    assert code == 0, err
    assert out.splitlines()[::2] == ["after w1 ?", "after w0 ?"], "several answers stand below their questions"
    assert context[predicted["start"] : predicted["end"]] == predicted["answer"]
    (folder / "ask.csv").write_text("question,context\nafter w1 ?,w0 w1 w2\n")
    code, _, err = deploykit("predict", run, "--input", folder / "ask.csv", "--output", folder / "asked.csv")
    assert code == 0, err
    assert (folder / "asked.csv").read_text().splitlines()[0] == "question,context,answer,start,end,score"
    code, _, err = deploykit("predict", run, "--input", folder / "squad.json", "--output", folder / "squad.csv")
    assert (code, "is not a table" in err) == (2, True), err


def test_an_export_becomes_a_bundle_for_a_jetson(exported: Path, folder: Path, deploykit: Deploykit) -> None:
    copy = Path(shutil.copytree(exported, folder / "for-jetson"))
    shutil.copyfile(copy / "model.onnx", copy / "model.qdq.onnx")
    write_manifest(copy, "export", load_manifest(exported).task, inputs="with TensorRT's graph")
    code, out, err = deploykit(
        "bundle", copy, "--device", "orin-nx", "--jetpack", "6.2", "--output", folder / "qa.tar.gz", "--json"
    )
    assert code == 0, err
    assert json.loads(out)["precisions"] == ["int8"]
    code, _, err = deploykit("unpack", folder / "qa.tar.gz", "--output-dir", folder / "device")
    assert code == 0, err
    (bundle,) = (folder / "device").iterdir()
    for step, says in (("build", "onnxruntime, int8"), ("verify", "100% of the answers equal the recorded ones")):
        done = subprocess.run(
            [bundle / "run.sh", step, "--engine", "onnxruntime"], capture_output=True, text=True, check=False,
            env={**os.environ, "PYTHON": sys.executable},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert says in done.stdout


def test_a_bundle_compares_spans_with_the_recorded_ones(exported: Path) -> None:
    facts = load_manifest(exported, "export").task
    bundled = task_of(facts).bundle(facts)
    assert set(bundled.inputs(exported / "model.onnx")) == {"input_ids", "attention_mask", "token_type_ids"}
    texts = [text for text in bundled.read(str(exported / SAMPLES), kept=True) if text is not None]
    model = bundled.load(exported, ("model.onnx",), "onnxruntime", {})
    answers = bundled.answers(model, texts)
    assert bundled.compare(answers, json.loads(json.dumps(answers)), "int8").right
    assert not bundled.compare([["", 0, 0], *answers[1:]], answers[::-1], "fp32").right


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--question", "q"), 2, "give --question and --context"),
        (("--question", "q", "--context", "c.txt", "--no-answer-threshold", "nan"), 2, "--no-answer-threshold is nan"),
        (("--input", "ask.jsonl"), 2, "--input and --output (or --page) go together"),
        (("--question", "q", "--context", "absent.txt"), 1, "absent.txt: cannot be read"),
        (("--input", "ask.jsonl", "--output", "out.txt"), 2, "files of type '.txt' are not written"),
    ],
)
def test_bad_options_are_refused(
    words: tuple[str, ...], code: int, message: str, run: Path, folder: Path, deploykit: Deploykit
) -> None:
    (folder / "ask.jsonl").touch()
    placed = [str(folder / word) if "." in word else word for word in words]
    done = deploykit("answer", run, *placed)
    assert (done.code, message in done.err) == (code, True), done.err


def test_bad_runs_are_refused(folder: Path, deploykit: Deploykit) -> None:
    start = ("finetune", "--task", "question-answering", folder / "base", "--output-dir", folder / "bad")
    for words, code, message in (
        (("--train", folder / "squad.json", "--max-length", 30, "--doc-stride", 30), 2, "a window has 30 tokens"),
        (("--train", folder / "squad.json", "--max-length", 400), 2, "takes at most 64 tokens"),
        (("--train", folder / "squad.json", "--max-length", 40, "--doc-stride", 36), 1, "squad.json:"),
        (("--train", folder / "squad.json", "--label-column", "x"), 2, "--label-column is for --task classification"),
    ):
        done = deploykit(*start, *words)
        assert (done.code, message in done.err) == (code, True), done.err


def test_the_serving_half_imports_neither_torch_nor_transformers() -> None:
    modules = ("task", "predictor", "served", "answer_texts", "evaluate", "triton_config", "metrics", "bundle")
    names = ", ".join(f"deploykit.tasks.question_answering.{module}" for module in modules)
    script = f"import sys, {names}; assert not {{'torch', 'transformers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
