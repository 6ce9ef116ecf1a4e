"""Training translation models from scratch and from a checkpoint with the commands."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from killed_run import kill_at_step
from words import with_options

from deploykit.artifacts import SAMPLES, load_manifest
from deploykit.quantization.qdq import quantize
from deploykit.tasks.translation.checkpoint import TorchTranslator
from deploykit.tasks.translation.facts import Translation

Deploykit = Callable[..., tuple[int, str, str]]
LANGUAGES = ("--task", "translation", "--source-lang", "en", "--target-lang", "fr")
QUICK = ("--max-steps", 8, "--eval-steps", 4, "--max-length", 32, "--batch-tokens", 512, "--eval-rows", 8)

THINGS = {"file": "fichier", "folder": "dossier", "user": "client", "network": "réseau", "page": "feuillet"}
DEEDS = {"Open": "Ouvrir", "Close": "Fermer", "Delete": "Supprimer", "Find": "Trouver", "Share": "Partager"}
WHICH = {"this": "ce", "every other": "chaque autre", "the first": "le premier", "the %s": "le %s"}
WHERE = {"here": "ici", "in {place}": "dans {place}", "<b>now</b>": "<b>tout de suite</b>"}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 pairs of made-up software strings."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.tsv"
    rows = itertools.product(DEEDS.items(), WHICH.items(), THINGS.items(), WHERE.items())
    lines = ["\t".join(" ".join(word[side] for word in row) for side in (0, 1)) for row in rows]
    path.write_text("\n".join(["en\tfr", *lines]) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def new_model(deploykit: Deploykit, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """marian-tiny after enough steps to have learned the words' order."""
    out = tmp_path_factory.mktemp("runs") / "new"
    code, _, err = deploykit("finetune", *LANGUAGES, "--from-config", "marian-tiny", "--train", pairs, "--output-dir", out,
                             "--max-steps", 150, "--eval-steps", 75, "--max-length", 32, "--batch-tokens", 512)  # fmt: skip
    assert code == 0, err
    return out


def test_a_new_model_has_the_documented_files(new_model: Path) -> None:
    names = {p.name for p in new_model.iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "source.spm", "target.spm", "vocab.json",
            "metrics.json", "README.md", "finetune.toml"} <= names  # fmt: skip
    assert list((new_model / "tensorboard").iterdir())
    config = json.loads((new_model / "config.json").read_text())
    assert (config["model_type"], config["activation_function"], config["scale_embedding"]) == ("marian", "swish", True)
    assert config["decoder_start_token_id"] == config["pad_token_id"] == config["vocab_size"] - 1
    task = load_manifest(new_model, "checkpoint").task
    assert isinstance(task, Translation)
    assert (task.source, task.target, task.family, task.max_source_length) == ("en", "fr", "marian", 32)
    assert task.generation.bad_words == ((task.pad_token_id,),)
    assert (task.source_column, task.target_column) == ("en", "fr")


def test_its_metrics_say_how_they_were_computed(new_model: Path) -> None:
    metrics = json.loads((new_model / "metrics.json").read_text())
    assert "before" not in metrics, "there was nothing to measure"
    for name in ("validation", "test"):
        assert metrics[name]["signatures"]["bleu"].startswith("nrefs:1|case:mixed")
        assert metrics[name]["placeholders"]["checked"] > 0
    assert metrics["test"]["chrf"] > 40, "it learned something"
    assert set(metrics["samples"][0]) == {"source", "reference", "translation"}
    card = (new_model / "README.md").read_text()
    assert "pipeline_tag: translation" in card
    assert f"| {metrics['test']['bleu']:.2f} [" in card


def test_no_text_of_either_side_is_in_two_splits(new_model: Path) -> None:
    splits = [(new_model / "splits" / f"{n}.jsonl").read_text().splitlines() for n in ("train", "validation", "test")]
    for side in ("source", "target"):
        texts = [{json.loads(line)[side] for line in lines} for lines in splits]
        assert not texts[0] & texts[1]
        assert not texts[0] & texts[2]
        assert not texts[1] & texts[2]


def test_pytorch_translates_the_test_rows_to_the_scores_in_the_metrics(new_model: Path) -> None:
    from deploykit.tasks.translation.metrics import translation_metrics

    rows = [json.loads(line) for line in (new_model / "splits" / "test.jsonl").read_text().splitlines()]
    answers = TorchTranslator.load(new_model).translate([row["source"] for row in rows])
    targets, sources = [row["target"] for row in rows], [row["source"] for row in rows]
    measured = translation_metrics([answer.text for answer in answers], targets, sources, "fr")
    kept = json.loads((new_model / "metrics.json").read_text())["test"]
    low, high = kept.pop("intervals")["bleu"]
    assert low <= kept["bleu"] <= high
    assert measured == kept


def test_a_saved_toml_repeats_the_run(deploykit: Deploykit, new_model: Path) -> None:
    code, out, err = deploykit("finetune", "--config", new_model / "finetune.toml", "--output-dir", new_model, "--json")
    assert code == 0, err
    assert json.loads(out)["reused"], "the same options are the same inputs"


def test_an_export_builds_engines_of_both_graphs(deploykit: Deploykit, new_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="the extra rtx is not installed")
    profile = "batch=1:4:8,length=1:16:32,past=1:16:32"
    words = ("export", new_model, "--trt", "--precision", "bf16", "--precision", "fp16", "--precision", "int8", "--builder",
             "rtx", "--gpu", "sm_86", "--calibration-rows", 32)  # fmt: skip
    code, out, err = deploykit(*words, "--output-dir", tmp_path / "e", "--profile", profile, "--max-drop", 20, "--json")
    assert code == 0, err
    record = json.loads(out)
    assert [generation["equal"] for generation in record["parity"]["tensorrt"]["generations"]] == [record["rows"]]
    graded = {line["precision"]: line for line in record["accuracy"]}
    assert graded["trt fp16"]["agreement"] > 0.9
    assert graded["trt int8"]["chrf"] > graded["fp32"]["chrf"] - 20
    manifest = load_manifest(tmp_path / "e")
    kinds = [(engine["precision"], engine["graph"].split(".")[0]) for engine in record["engines"]]
    assert kinds == [(p, part) for p in ("bf16", "fp16", "int8") for part in ("encoder", "decoder")]
    for engine in record["engines"]:
        assert (engine["int8_gemms"] > 8) == (engine["precision"] == "int8"), engine
        assert (engine["calibration"] is not None) == (engine["precision"] == "int8")
        assert engine["profiles"] == [profile]
        assert {engine["file"], engine["graph"], f"shared.trt.{engine['precision']}.bin"} <= set(manifest.files)
    assert not (tmp_path / "e" / "decoder.trt.fp32.onnx").exists(), "it was not asked for"
    kept = [json.loads(line) for line in (tmp_path / "e" / SAMPLES).read_text().splitlines()]
    tested = [json.loads(line) for line in (new_model / "splits" / "test.jsonl").read_text().splitlines()]
    assert len(kept) == min(64, record["rows"])
    assert {row["source"] for row in kept} <= {row["source"] for row in tested}

    code, _, err = deploykit(*words, "--output-dir", tmp_path / "f", "--profile", "batch=1:4:8,length=1:16:32")
    assert (code, "past is missing" in err) == (2, True)


def test_int8_for_tensorrt_is_held_to_the_limit(
    deploykit: Deploykit, new_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If only INT8 for TensorRT loses too much, its own search finds the layers that must stay in fp16."""
    pytest.importorskip("tensorrt_rtx", reason="the extra rtx is not installed")
    from deploykit.graphs import standard_writer as writer

    def ruined(model: Any, ranges: Any, *args: Any, **options: Any) -> Any:
        """Quantize with a range so wide for the projection that all its inputs are rounded to 0."""
        last = next((n.input[0] for n in model.graph.node if n.op_type == "Gemm"), "")
        wide = {name: (-1e5, 1e5) if name == last else limits for name, limits in ranges.items()}
        return quantize(model, wide, *args, **options)

    monkeypatch.setattr(writer, "quantize", ruined)
    code, out, err = deploykit("export", new_model, "--output-dir", tmp_path / "e", "--trt", "--precision", "int8", "--builder",
                               "rtx", "--calibration-rows", 32, "--measure-rows", 12, "--max-drop", 20, "--json")  # fmt: skip
    assert code == 0, err
    search = json.loads(out)["quantization"]["search"]
    assert set(search) == {"tensorrt"}
    assert search["tensorrt"]["kept"] == ["decoder.projection"]


def test_a_killed_search_resumes_from_its_calibration_and_log(
    deploykit: Deploykit, new_model: Path, with_ranges: Callable[..., None], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from deploykit.measurement_log import MeasurementLog

    code, out, err = deploykit(
        "calibrate", new_model, "--calibration-rows", 32, "--output-dir", tmp_path / "c", "--json"
    )
    assert code == 0, err
    assert {"decoder.projection", "cross", "encoder.0.self.qkv"} <= set(json.loads(out)["ranges"])
    with_ranges(tmp_path / "c", "decoder.projection", 1e5)  # all its inputs are rounded to 0

    original, made = MeasurementLog.measured, []

    def killed(trace: MeasurementLog, name: str, measure: Callable[[], Any]) -> Any:
        made.append(name)
        if len(made) > 3:
            raise KeyboardInterrupt
        return original(trace, name, measure)

    monkeypatch.setattr(MeasurementLog, "measured", killed)
    words = ("export", new_model, "--int8", "--calib", tmp_path / "c", "--output-dir", tmp_path / "e", "--measure-rows", 12,
             "--max-drop", 20, "--optimum")  # fmt: skip
    assert deploykit(*words)[0] == 130
    assert {p.name for p in tmp_path.iterdir()} == {"c", "e.search.json"}
    monkeypatch.setattr(MeasurementLog, "measured", original)
    code, out, err = deploykit(*words, "--json")
    assert code == 0, err
    assert "e.search.json: 3 measurements of an unfinished run are reused" in err
    found = json.loads(out)["quantization"]["search"]["onnxruntime"]
    assert found["kept"] == found["order"][:1] == ["decoder.projection"]
    assert found["sensitivity"][0] > 10 * found["sensitivity"][1], "each part was measured alone"
    assert {p.name for p in tmp_path.iterdir()} == {"c", "e"}
    assert "chrF" in (tmp_path / "e" / "search.html").read_text()
    again = json.loads((tmp_path / "e" / "calibration.json").read_text())
    assert again["rows"] == 32

    code, _, err = deploykit("calibrate", tmp_path / "e", "--calibration-data", new_model / "splits" / "train.jsonl",
                             "--calibration-rows", 32, "--output-dir", tmp_path / "d")  # fmt: skip
    assert code == 0, err
    collected = [load_manifest(tmp_path / name, "calibration") for name in "cd"]
    assert collected[0].parent == collected[1].parent
    assert collected[0].metrics["rows_digest"] == collected[1].metrics["rows_digest"]
    assert collected[0].metrics["ranges"] == collected[1].metrics["ranges"], "the export's graphs are the checkpoint's"


def test_fine_tuning_shows_before_and_after(deploykit: Deploykit, new_model: Path, pairs: Path, tmp_path: Path) -> None:
    words = (
        "finetune",
        *LANGUAGES,
        new_model,
        "--train",
        pairs,
        "--output-dir",
        tmp_path / "r",
        *QUICK,
        "--num-beams",
        3,
    )
    code, out, err = deploykit(*words, "--json")
    assert code == 0, err
    record = json.loads(out)
    assert record["before"]["chrf"] > 40
    assert record["metrics"]["chrf"] > 40
    assert {"source", "reference", "before", "translation"} == set(record["samples"][0])
    assert load_manifest(tmp_path / "r").task.generation.beam_size == 3
    assert json.loads((tmp_path / "r" / "generation_config.json").read_text())["num_beams"] == 3
    code, out, _ = deploykit(*words)
    assert code == 0
    assert "before" in out
    assert "after" in out


def test_finetune_takes_the_options_of_trainer(
    deploykit: Deploykit, pairs: Path, new_model: Path, tmp_path: Path
) -> None:
    lines = pairs.read_text().splitlines()
    (tmp_path / "held.tsv").write_text("\n".join(["en\tfr", *lines[1:40]]) + "\n")
    code, out, err = deploykit(
        "finetune", *LANGUAGES, new_model, "--train", pairs, "--validation", tmp_path / "held.tsv",
        "--output-dir", tmp_path / "r", *QUICK, "--max-train-samples", 100, "--gradient-accumulation-steps", 2, "--lr-scheduler-type", "inverse_sqrt",
        "--optimizer", "sgd", "--dropout", 0.2, "--label-smoothing-factor", 0.2, "--early-stopping-patience", 1, "--lora-r", 2,
        "--mixed-precision", "bf16", "--test-fraction", 0, "--json",
    )  # fmt: skip
    assert code == 0, err
    assert "training rows dropped" in err
    assert json.loads(out)["rows"] == {"train": 100, "validation": 39, "test": 0}
    assert (tmp_path / "r" / "adapter_model.safetensors").is_file()
    assert TorchTranslator.load(tmp_path / "r").translate(["Open this file here"])[0].text


def test_a_corpus_of_two_text_files(deploykit: Deploykit, pairs: Path, tmp_path: Path) -> None:
    lines = [line.split("\t") for line in pairs.read_text().splitlines()[1:]]
    for side, language in enumerate(("en", "fr")):
        (tmp_path / f"corpus.{language}").write_text("\n".join(line[side] for line in lines) + "\n")
    words = ("finetune", *LANGUAGES, "--from-config", "marian-tiny", "--train", tmp_path / "corpus", *QUICK)
    code, out, err = deploykit(*words, "--output-dir", tmp_path / "r", "--json")
    assert code == 0, err
    assert json.loads(out)["rows"]["train"] > 200
    (tmp_path / "corpus.fr").write_text("\n".join([line[1] for line in lines][:-1]) + "\n")
    code, _, err = deploykit(*words, "--output-dir", tmp_path / "r")
    assert code == 1
    assert "corpus" in err


def test_a_killed_run_continues_to_the_same_end(deploykit: Deploykit, pairs: Path, tmp_path: Path) -> None:
    words = ("finetune", *LANGUAGES, "--from-config", "marian-tiny", "--train", pairs, "--max-steps", 12, "--eval-steps", 3,
             "--max-length", 32, "--batch-tokens", 512, "--augment", "typos=0.3", "--json")  # fmt: skip
    code, out, err = deploykit(*words, "--output-dir", tmp_path / "whole")
    assert code == 0, err
    assert " with typos: " in err
    splits = "".join(path.read_text() for path in (tmp_path / "whole" / "splits").iterdir())
    assert " with typos" not in splits, "only the training sees the copies"
    assert "copies of the training rows" in (tmp_path / "whole" / "README.md").read_text()
    whole = json.loads(out)
    kill_at_step(7, *words, "--output-dir", tmp_path / "killed")
    assert list(tmp_path.glob(".killed.*.training/trainer/checkpoint-6/trainer_state.json"))
    assert not (tmp_path / "killed").exists(), "nothing that looks finished"
    code, out, err = deploykit(*words, "--output-dir", tmp_path / "killed")
    assert code == 0, err
    assert "continuing the unfinished run" in err
    assert json.loads(out)["metrics"] == whole["metrics"]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("killed", "whole")]
    assert weights[0] == weights[1], "bit for bit"
    assert not list(tmp_path.glob(".killed*")), "the work directory is gone"


@pytest.mark.parametrize(
    ("words", "code", "named"),
    [
        ((), 2, ["--from-config", "marian-small"]),
        (("x", "--from-config", "marian-tiny"), 2, ["a checkpoint and --from-config"]),
        (("--from-config", "marian-huge"), 2, ["marian-huge"]),
        (("--from-config", "marian-tiny", "--target-lang", "en"), 2, ["--source-lang and --target-lang are both en"]),
        (("--from-config", "marian-tiny", "--num-beams", 0), 2, ["--num-beams is 0"]),
        (("--from-config", "marian-tiny", "--num-beams", 10_000), 2, ["--num-beams is 10000"]),
        (
            ("--from-config", "marian-tiny", "--class-weights", "balanced"),
            2,
            ["--class-weights", "--task classification"],
        ),
        (("--from-config", "marian-tiny", "--max-length", 4096), 2, ["--max-length", "512"]),
        (("--from-config", "marian-tiny", "--source-column", "german"), 1, ["german", "en"]),
        (("NEW", "--max-length", 4096), 2, ["--max-length", "32"]),
        (("NEW", "--vocabulary", 500), 2, ["--vocabulary"]),
        (("NO-SPM",), 1, ["source.spm"]),
        (("MINILM",), 1, ["bert", "marian"]),
        (("NEW", "--task", "classification"), 2, ["--source-lang", "--task translation"]),
    ],
)
def test_wrong_options_are_refused(
    deploykit: Deploykit,
    pairs: Path,
    new_model: Path,
    minilm: Path,
    tmp_path: Path,
    words: tuple[object, ...],
    code: int,
    named: list[str],
) -> None:
    models: dict[object, Path] = {"NEW": new_model, "MINILM": minilm, "NO-SPM": tmp_path / "no-spm"}
    if "NO-SPM" in words:
        shutil.copytree(new_model, tmp_path / "no-spm")
        for name in ("source.spm", "manifest.json"):
            (tmp_path / "no-spm" / name).unlink()
    before = {p.name for p in tmp_path.iterdir()}
    typed = [models.get(word, word) for word in words]
    models_named, options = typed[: len(typed) % 2], typed[len(typed) % 2 :]
    got, _, err = deploykit(
        "finetune",
        *models_named,
        *with_options((*LANGUAGES, "--train", pairs, "--output-dir", tmp_path / "o"), *options),
    )
    assert got == code, err
    for part in named:
        assert part in err
    assert {p.name for p in tmp_path.iterdir()} == before


def test_smooth_quant_is_not_for_translators(deploykit: Deploykit, new_model: Path, tmp_path: Path) -> None:
    code, _, err = deploykit("export", new_model, "--output-dir", tmp_path / "e", "--int8", "--smooth-quant")
    assert code == 2
    assert "--smooth-quant is for classifiers" in err
    assert list(tmp_path.iterdir()) == []


def test_a_translation_checkpoint_is_not_a_classifier(deploykit: Deploykit, new_model: Path, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(
        "text,label\n" + "".join(f"some {w} {i},{w}\n" for i in range(9) for w in ("a", "b"))
    )
    code, _, err = deploykit("finetune", new_model, "--train", tmp_path / "t.csv", "--output-dir", tmp_path / "o")
    assert code == 1
    assert "is a checkpoint for translation, not classification" in err
    assert "--task translation" in err


def test_a_smaller_student_learns_its_teachers_translations(
    deploykit: Deploykit, new_model: Path, pairs: Path, tmp_path: Path
) -> None:
    # The rows are all wrong, and the teacher knows better.
    lines = pairs.read_text(encoding="utf-8").splitlines()
    wrong = tmp_path / "wrong.tsv"
    targets = [line.split("\t")[1] for line in lines[1:]]
    rows = [
        f"{line.split(chr(9))[0]}\t{' '.join(reversed(target.split()))}" for line, target in zip(lines[1:], targets)
    ]
    wrong.write_text("\n".join([lines[0], *rows]) + "\n", encoding="utf-8")
    right, out = tmp_path / "right.tsv", tmp_path / "student"
    right.write_text("\n".join([lines[0], *lines[1::10]]) + "\n", encoding="utf-8")
    command = (
        "finetune", new_model, *LANGUAGES, "--student", "layers=1", "--train", wrong, "--test", right, "--eval-steps", 20,
        "--max-steps", 60, "--max-length", 32, "--batch-tokens", 512, "--learning-rate", 1e-3, "--validation-fraction", 0,
        "--max-train-samples", 200,
    )  # fmt: skip
    code, _, err = deploykit(*command, "--output-dir", tmp_path / "untaught")
    assert code == 0, err
    untaught = json.loads((tmp_path / "untaught" / "metrics.json").read_text())
    command = (*command, "--teacher", new_model, "--output-dir", out)
    kill_at_step(30, *command)
    code, _, err = deploykit(*command)
    assert code == 0, err
    assert "train: the teacher has translated 200 of 200 before" in err
    assert "the student's encoder has the layers [0]" in err
    assert "the student's decoder has the layers [0]" in err
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["distilled"]["taught"] > 100
    assert set(metrics["distilled"]) == {"taught", "same", "untranslated", "leaks"}
    assert metrics["test"]["bleu"] > untaught["test"]["bleu"] + 5
    assert metrics["teacher"]["test"]["chrf"] > metrics["before"]["test"]["chrf"] - 1, "the same model, with beams"
    config = json.loads((out / "config.json").read_text())
    assert (config["encoder_layers"], config["decoder_layers"]) == (1, 1)
    assert "a teacher's translation" in (out / "README.md").read_text()
    code, out_text, _ = deploykit("finetune", "--config", out / "finetune.toml", "--output-dir", out)
    assert code == 0
    assert "reused" in out_text


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("--distill-targets", "join"), 2, "--distill-targets is for --teacher"),
        (("--student", "layers=1", "--lora-r", 4), 2, "--lora-r adapts a checkpoint as it is"),
        (("--student", "layers=9"), 2, "--student asks for 9 layers, and the encoder has"),
        (("--student", "layers=1,decoder=9"), 2, "--student asks for 9 layers, and the decoder has"),
        (("--teacher", "no/such"), 1, "no/such: no such directory"),
    ],
)
def test_a_student_without_sense_is_refused(
    words: tuple[object, ...], code: int, says: str, deploykit: Deploykit, new_model: Path, pairs: Path, tmp_path: Path
) -> None:
    command = ("finetune", new_model, *LANGUAGES, "--train", pairs, "--output-dir", tmp_path / "r", *QUICK, *words)
    found, _, err = deploykit(*command)
    assert (found, says in err) == (code, True), err
