"""Wrong commands give a clear error with a remedy and the right exit code, and leave nothing behind."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Deploykit = Callable[..., tuple[int, str, str]]
GOOD = "text,label\n" + "".join(
    f"some {word} words {i},{label}\n" for i in range(12) for word, label in (("fine", "good"), ("poor", "bad"))
)
PRICES = "text,price\n" + "".join(f"some fine words {i},{i}.5\n" for i in range(24))


@pytest.mark.parametrize(
    ("content", "words", "code", "named"),
    [
        (b"", (), 1, ["t.csv", "empty"]),
        (b"text,label\n", (), 1, ["t.csv", "rows"]),
        (b"body,kind\na,b\n", ("--text-column", "text"), 1, ["text", "body"]),
        (b"a,b,c\n1,2,3\n", (), 1, ["--text-column"]),
        (b"text,label\nhello,x\nworld,x\nagain,x\n", (), 1, ["'x'", "two labels"]),
        (b"text,label\n\xff\xfe\xfa,x\n", (), 1, ["t.csv", "--encoding"]),
        (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", (), 1, ["t.csv", "PNG"]),
        (b"text,label\na,b,c,d\n", (), 1, ["t.csv", "2"]),
        (b"text,label\n,x\n,y\n", (), 1, ["usable"]),
        (
            PRICES.encode(),
            ("--text-column", "text", "--label-column", "price"),
            1,
            ["'price'", "24 labels", "--regression"],
        ),
        (GOOD.encode(), ("--encoding", "klingon"), 2, ["klingon"]),
        (GOOD.encode(), ("--num-train-epochs", "-1"), 2, ["--num-train-epochs"]),
        (GOOD.encode(), ("--max-length", "100000"), 2, ["--max-length", "512"]),
        (GOOD.encode(), ("--optimizer", "magic"), 2, ["--optimizer"]),
        (GOOD.encode(), ("--test", "nowhere.csv"), 1, ["nowhere.csv"]),
        (GOOD.encode(), ("--mixed-precision", "fp16"), 2, ["GPU"]),
    ],
)
def test_bad_training_data_and_options(
    deploykit: Deploykit,
    minilm: Path,
    tmp_path: Path,
    content: bytes,
    words: tuple[str, ...],
    code: int,
    named: list[str],
) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    got, out, err = deploykit(
        "finetune", minilm, "--train", tmp_path / "t.csv", "--output-dir", tmp_path / "out", *words, "--json"
    )
    assert got == code, err
    for part in named:
        assert part in err
    if code == 1:
        assert json.loads(out)["error"]["remedy"]
    assert [p.name for p in tmp_path.iterdir()] == ["t.csv"]


def test_a_label_never_seen_in_training(deploykit: Deploykit, minilm: Path, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(GOOD)
    (tmp_path / "x.csv").write_text("text,label\nhello,good\nnew,superb\n")
    code, _, err = deploykit("finetune", minilm, "--train", tmp_path / "t.csv", "--test", tmp_path / "x.csv",
                             "--output-dir", tmp_path / "o")  # fmt: skip
    assert code == 1
    assert "superb" in err
    assert "x.csv:3" in err


@pytest.mark.parametrize("what", ["missing", "no config", "no tokenizer", "pickled", "export", "a file"])
def test_invalid_models_are_refused(
    deploykit: Deploykit, minilm: Path, tiny_export: Path, tmp_path: Path, what: str
) -> None:
    (tmp_path / "t.csv").write_text(GOOD)
    model = tmp_path / "model"
    expected = {
        "missing": "no such model folder", "no config": "config.json", "no tokenizer": "no tokenizer", "pickled": "other than tensors",
        "export": "an export, not a checkpoint", "a file": "config.json",
    }[what]  # fmt: skip
    if what == "a file":
        model.write_text("x")
    elif what == "export":
        model = tiny_export
    elif what != "missing":
        shutil.copytree(minilm, model)
        if what == "no config":
            (model / "config.json").unlink()
        elif what == "no tokenizer":
            for name in ("tokenizer.json", "vocab.txt"):
                (model / name).unlink()
        else:
            (model / "model.safetensors").rename(model / "pytorch_model.bin")
    code, _, err = deploykit("finetune", model, "--train", tmp_path / "t.csv", "--output-dir", tmp_path / "o")
    assert code == 1
    assert expected in err
    assert not (tmp_path / "o").exists()


def test_a_mistyped_run_is_not_looked_for_on_the_hub(
    deploykit: Deploykit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "manifest.json").write_text("{}")
    code, _, err = deploykit("export", "runs/b", "--output-dir", "exports/b")
    assert code == 1
    assert "runs/b: no such model folder" in err


def test_a_folder_with_a_gguf_file_names_it(
    deploykit: Deploykit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lm").mkdir()
    (tmp_path / "lm" / "model.q8_0.gguf").write_bytes(b"")
    (tmp_path / "t.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    code, _, err = deploykit("finetune", "lm", "--task", "text-generation", "--train", "t.jsonl", "--output-dir", "o")
    assert code == 1
    assert "remedy: pass the file " in err
    assert "lm/model.q8_0.gguf\n" in err


def test_a_model_neither_local_nor_on_the_hub_is_refused(deploykit: Deploykit, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(GOOD)
    code, _, err = deploykit(
        "finetune", "nobody/nothing", "--train", tmp_path / "t.csv", "--output-dir", tmp_path / "o"
    )
    assert code == 1
    assert "nobody/nothing" in err


def test_an_export_in_place_of_a_checkpoint_is_refused(deploykit: Deploykit, tiny_export: Path, tmp_path: Path) -> None:
    code, _, err = deploykit("export", tiny_export, "--output-dir", tmp_path / "o")
    assert code == 1
    assert "is an export, not a checkpoint" in err


def test_a_checkpoint_in_place_of_an_export_is_refused(deploykit: Deploykit, checkpoint: Path, tmp_path: Path) -> None:
    code, _, err = deploykit("package", checkpoint, "--name", "x", "--model-repository", tmp_path / "r")
    assert code == 1
    assert "is a checkpoint, not an export" in err
    assert not (tmp_path / "r" / "x" / "1").exists()


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_a_folder_that_no_stage_wrote_is_kept(
    deploykit: Deploykit, checkpoint: Path, tmp_path: Path, force: tuple[str, ...]
) -> None:
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "notes.txt").write_text("mine")
    code, _, err = deploykit("export", checkpoint, "--output-dir", tmp_path / "o", *force)
    assert code == 1
    assert "no deploykit stage wrote it" in err
    assert (tmp_path / "o" / "notes.txt").read_text() == "mine"


def test_a_full_disk_in_the_middle_of_an_export(deploykit: Deploykit, checkpoint: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        code, _, err = deploykit("export", checkpoint, "--output-dir", disk / "e")
        assert code == 1
        assert str(disk) in err
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(
    ("words", "code", "named"),
    [
        (("predict", "nobody", "hello"), 1, "deploykit serve"),
        (("predict", "nobody"), 2, "--input"),
        (("predict", "nobody", "--input", "x.csv"), 2, "--output"),
        (("predict", "no/where", "hello"), 1, "no/where"),
        (("evaluate", "nobody", "--data", __file__), 1, "127.0.0.1:9"),
        (("evaluate", "nobody", "--data", __file__, "--url", "ftp://x"), 2, "ftp://x"),
        (("serve", "--model-repository", "nowhere"), 1, "nowhere"),
        (("inspect", "nowhere"), 1, "nowhere"),
        (("bench", "nowhere/at/all", "--data", "x.csv"), 1, "nowhere"),
        (("calibrate", "no/such/run", "--output-dir", "x"), 1, "no such model folder"),
        (("calibrate", "runs", "--output-dir", "x", "--calibration-rows", "0"), 2, "--calibration-rows is 0"),
        (("export", "runs", "--output-dir", "x", "--method", "guess"), 2, "guess"),
        (("export", "runs", "--output-dir", "x", "--precision", "fp16"), 2, "add --trt"),
        (("export", "runs", "--output-dir", "x", "--gpu", "sm_86"), 2, "add --trt"),
        (("export", "runs", "--output-dir", "x", "--trt", "--precision", "fp8"), 2, "fp8"),
        (("export", "runs", "--output-dir", "x", "--trt", "--maxShapes", "batch=4"), 2, "--maxShapes 1 times"),
        (("export", "runs", "--output-dir", "x", "--trt", "--memPoolSize", "much"), 2, "--memPoolSize"),
        (
            ("export", "runs", "--output-dir", "x", "--trt", "--gpu", "sm_86", "--target", "sm_89"),
            2,
            "several GPUs are given: sm_89, sm_86",
        ),
        (("dance",), 2, "dance"),
    ],
)
def test_unknown_paths_and_names_are_refused(
    deploykit: Deploykit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], code: int, named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if words[0] != "serve" and "--url" not in words and words[0] in ("predict", "evaluate"):
        words = (*words, "--url", "http://127.0.0.1:9")
    got, _, err = deploykit(*words)
    assert got == code, err
    assert named in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_unusual_texts_are_answered(deploykit: Deploykit, exported: Path, engine: str) -> None:
    texts = ["😀" * 50, "我爱你", "مرحبا بالعالم", "a\x00b", "x" * 100_000, "\u202eright to left", "\ufffd"]
    code, out, err = deploykit("predict", exported, "--engine", engine, "--json", *texts, "  ")
    assert code == 0, err
    results = json.loads(out)["results"]
    assert len(results) == len(texts) + 1
    for result in results:
        assert sum(result["scores"].values()) == pytest.approx(1, abs=1e-5)
