"""``evaluate --report`` and ``finetune --temperature-scaling`` on real text."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import language_models
import numpy as np
import pytest
from tiny_answerer import write_checkpoint as write_answerer
from tiny_answerer import write_squad

import deploykit as api
from deploykit.artifacts import load_manifest
from deploykit.tasks.text_generation.chat_template import CHATML

Deploykit = Callable[..., tuple[int, str, str]]


def test_a_report_shows_what_lies_behind_the_metrics(
    deploykit: Deploykit, checkpoint: Path, small_csv: Path, tmp_path: Path
) -> None:
    with small_csv.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[::4]  # they are sorted by label
    data, new = tmp_path / "rows.csv", tmp_path / "new.txt"
    with data.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label", "airline"])
        writer.writeheader()
        writer.writerows({**row, "airline": f"line {i % 3}"} for i, row in enumerate(rows))
    new.write_text("Guten Morgen zusammen\n" * 40, encoding="utf-8")
    page = tmp_path / "report.html"
    words = ("evaluate", checkpoint, "--data", data, "--report", page, "--slice", "airline", "--against", new)
    code, out, err = deploykit(*words, "--json")
    assert code == 0, err
    record = json.loads(out)
    report = record["report"]
    assert {f"airline: line {i}" for i in range(3)} <= {one["slice"] for one in report["slices"]}
    assert sum(one["rows"] for one in report["slices"] if one["slice"].startswith("airline")) == len(rows)
    low, high = record["metrics"]["intervals"]["macro_f1"]
    assert low < record["metrics"]["macro_f1"] < high < 1
    assert {"calibration", "label_errors", "tied_words", "flips", "groups", "drift"} <= set(report)
    assert any(test["drifts"] for test in report["drift"]["tests"])
    assert page.read_text(encoding="utf-8").count("<svg") == 3
    for given, says in (
        ((*words,), "already exists"),
        (("evaluate", checkpoint, "--data", data, "--report", data, "--force"), "an HTML page is written"),
        (("evaluate", checkpoint, "--data", data, "--slice", "airline"), "are for a report"),
        ((*words[:-4], "--force", "--slice", "airport"), "has no column 'airport'"),
    ):
        code, _, err = deploykit(*given)
        assert code, says
        assert says in err


def test_a_fitted_temperature_goes_with_the_export(
    deploykit: Deploykit, make_tiny_checkpoint: Callable[..., Path], small_csv: Path, tmp_path: Path
) -> None:
    model = make_tiny_checkpoint(tmp_path / "model")
    runs = {}
    for scaled in (False, True):
        runs[scaled] = api.finetune(
            model, train=small_csv, output_dir=tmp_path / f"run-{scaled}", max_train_samples=200, max_steps=4,
            temperature_scaling=scaled,
        )  # fmt: skip
    temperature = runs[True].manifest.task.temperature  # type: ignore[attr-defined]
    assert runs[False].manifest.task.temperature == 1.0  # type: ignore[attr-defined]
    assert temperature != 1.0
    exported = api.export(runs[True].path, tmp_path / "export")
    assert load_manifest(exported.path).task.temperature == temperature  # type: ignore[attr-defined]
    texts = ["w1 w2 w3", "w9"]
    with api.load(exported.path) as model_, api.load(runs[False].path) as plain:
        scores = plain.predictor.scores(texts)  # type: ignore[attr-defined]
        logits = np.log(scores) / temperature
        expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        assert model_.predictor.scores(texts) == pytest.approx(expected, abs=1e-4)  # type: ignore[attr-defined]
    code, _, err = deploykit("finetune", model, "--train", small_csv, "--output-dir", tmp_path / "x", "--temperature-scaling",
                             "--validation-fraction", 0)  # fmt: skip
    assert code == 2
    assert "--temperature-scaling needs validation rows" in err


def test_translations_answers_and_generated_texts_have_reports(
    deploykit: Deploykit, make_tiny_translation: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in language_models.write_rows(tmp_path / "all.jsonl").read_text().splitlines()][
        :40
    ]
    lm, other = (
        language_models.write_checkpoint(tmp_path / name, kind, CHATML)
        for name, kind in (("lm", "llama"), ("q", "qwen2"))
    )
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({**row, "shell": "ab"[i % 2]}) + "\n" for i, row in enumerate(rows)))
    (tmp_path / "seen.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:12]))
    pairs = tmp_path / "pairs.csv"
    pairs.write_text(
        "en,fr,shell\n" + "".join(f"Save the file {i} %s.,Enregistrer {i} %s.,{'ab'[i % 2]}\n" for i in range(24))
    )
    (tmp_path / "seen.csv").write_text("en,fr\n" + "".join(f"Save the file {i} %s.,x\n" for i in range(12)))
    (tmp_path / "new.csv").write_text("en\n" + "Open it\n" * 12)
    (tmp_path / "new.jsonl").write_text('{"prompt": "copy the file above"}\n' * 12)
    translator = make_tiny_translation(tmp_path / "fr", max_length=24)
    second = make_tiny_translation(tmp_path / "fr2", max_length=24, seed=1)
    questions = json.loads(write_squad(tmp_path / "squad.json", 12, 3).read_text())
    table = [
        {"question": qa["question"], "context": p["context"], "answers": qa["answers"], "shell": "ab"[i % 2]}
        for p in questions["data"][0]["paragraphs"] for i, qa in enumerate(p["qas"])
    ]  # fmt: skip
    asked = tmp_path / "asked.jsonl"
    asked.write_text("".join(json.dumps(row) + "\n" for row in table))
    (tmp_path / "seen_q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table[:12]))
    answerer, weaker = (write_answerer(tmp_path / name, sharp=sharp) for name, sharp in (("qa", True), ("qa2", False)))
    for model, baseline, data, seen, new, metric, more in (
        (lm, other, prompts, "seen.jsonl", "new.jsonl", "token_f1", ("--max-new-tokens", 6)),
        (translator, second, pairs, "seen.csv", "new.csv", "chrf", ()),
        (answerer, weaker, asked, "seen_q.jsonl", "squad.json", "f1", ()),
    ):
        page = tmp_path / f"{model.name}.html"
        words = ("evaluate", model, "--data", data, *more)
        code, out, err = deploykit(
            *words, "--report", page, "--slice", "shell", "--seen", tmp_path / seen, "--against", tmp_path / new,
            "--baseline", baseline, "--json",
        )  # fmt: skip
        assert code == 0, err
        record = json.loads(out)
        report = record["report"]
        by_name = {one["slice"]: one for one in report["slices"]}
        assert {"shell: a", "shell: b", "seen in training: yes", "seen in training: no"} <= set(by_name)
        assert by_name["shell: a"]["rows"] + by_name["shell: b"]["rows"] == record["rows"]
        assert by_name["seen in training: yes"]["rows"] == 12
        assert [one[metric] for one in report["slices"]] == sorted(one[metric] for one in report["slices"])
        worst = report["worst"]
        assert worst[0]["expected"] != worst[0]["answer"]
        assert [one[metric] for one in worst] == sorted(one[metric] for one in worst)
        assert report["drift"]["rows"] > 0
        assert [one["noise"] for one in report["robustness"]] == ["clean", "typos", "case", "punctuation"]
        assert report["robustness"][0][metric] == pytest.approx(record["metrics"][metric])
        low, high = report["robustness"][1]["intervals"][metric]
        assert low <= report["robustness"][1][metric] <= high
        assert "Robustness" in page.read_text(encoding="utf-8")
        assert ("calibration" in report) == (metric != "chrf")
        low, high = record["metrics"]["intervals"][metric]
        assert low <= record["metrics"][metric] <= high
        found = record["differences"][metric]
        assert found["difference"] == pytest.approx(
            record["metrics"][metric] - record["baseline"]["metrics"][metric], abs=2e-4
        )
        assert found["beyond_noise"] == (not found["interval"][0] <= 0 <= found["interval"][1])
        assert page.read_text(encoding="utf-8").count("<svg") == (1 if metric == "chrf" else 2)
        code, _, err = deploykit(*words, "--report", tmp_path / "x.html", "--swaps", data)
        assert code == 2
        assert "--swaps is for classifiers" in err
    assert set(record["metrics"]["intervals"]) >= {"exact_match", "f1"}
    code, out, err = deploykit("evaluate", lm, "--baseline", other, "--data", prompts, "--max-new-tokens", 4)
    assert code == 0, err
    assert "paired bootstrap" in out
    code, _, err = deploykit("evaluate", lm, "--data", prompts, "--seen", prompts)
    assert code == 2
    assert "--seen and --swaps are for a report" in err
