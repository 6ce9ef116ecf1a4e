"""Translators in the bench: tokens, references, search options, and time by stage."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from deploykit.bench.load import measure
from deploykit.bench.rows import read_rows
from deploykit.bench.run import Candidate, run_bench
from deploykit.bench.scenarios import ClosedLoop
from deploykit.bench.separate_process import measure_alone
from deploykit.cli import main
from deploykit.errors import UsageError
from deploykit.report.pages import write_report
from deploykit.runtime.generation import Generation
from deploykit.runtime.serving_settings import LongInput, Split
from deploykit.tasks.classification.facts import Classification
from deploykit.tasks.translation.facts import Translation
from deploykit.tasks.translation.translated import Translated

TASK = Translation("en", "fr", "marian", vocabulary=100, max_source_length=64, max_target_length=64, pad_token_id=99,
                   eos_token_ids=(0,), decoder_start_token_id=99)  # fmt: skip
TEXTS = ["one", "one two", "one two three"]
STAGES = ["tokenizing", "encoder", "decoder", "search", "detokenizing"]


class Shouter:
    """A translator to capitals, with one token per word, that records its arguments."""

    task = TASK

    def __init__(self) -> None:
        self.asked: list[tuple[int, Generation | None, bool]] = []

    def translate(
        self,
        texts: Sequence[str],
        generation: Generation | None = None,
        *,
        long_input: LongInput = "split",
        split: Split = "sentence",
        scored: bool = True,
    ) -> list[Translated]:
        self.asked.append((len(texts), generation, scored))
        return [Translated(text.upper(), 0.0, len(text.split()), len(text.split()), "eos") for text in texts]

    def close(self) -> None:
        pass


class Labeller:
    task = Classification(("a", "b"), max_length=8, pad_token_id=0)


def bench(*words: str) -> Any:
    done = CliRunner().invoke(main, ["bench", *words, "--rounds", "1", "--seconds", "0.05", "--json"])
    return done.exit_code, json.loads(done.stdout)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.tsv"
    path.write_text(
        "en\tfr\nSave the file.\tEnregistrez le fichier.\nOpen {name}?\tOuvrir {name} ?\n", encoding="utf-8"
    )
    return path


def test_callers_share_one_call_without_scores() -> None:
    translator = Shouter()
    beams = Generation(beam_size=4)
    m = measure(translator, TEXTS, ClosedLoop(3), seconds=0.05, generation=beams, warmup_s=0)
    assert set(translator.asked) == {(3, beams, False)}
    assert m.answers == {0: "ONE", 1: "ONE TWO", 2: "ONE TWO THREE"}
    assert m.tokens == 6 * len(translator.asked)
    assert m.tokens_per_s == pytest.approx(2 * m.throughput_per_s)
    assert m.seconds is None  # it does not count them


def test_translations_are_graded_against_references() -> None:
    references = ["ONE", "ONE TWO", "something else"]
    result = run_bench(
        [Candidate("s", Shouter())], TEXTS, references, [ClosedLoop(2)], rounds=2, seconds=0.05, warmup_s=0
    )
    record = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert 0 < record["metrics"]["chrf"] < 100
    assert record["tokens_per_s"] == record["candidates"][0]["scenarios"][0]["tokens_per_s"]["median"] > 0
    assert record["candidates"][0]["task"] == "translation"
    assert record["candidates"][0]["labels"] is None
    assert record["candidates"][0]["disagreements"] == 0


def test_a_classifier_and_a_translator_are_not_compared() -> None:
    with pytest.raises(UsageError, match="some models classify and some translate"):
        run_bench([Candidate("s", Shouter()), Candidate("l", Labeller())], TEXTS)  # type: ignore[arg-type]


def test_exports_are_measured_with_references_and_options(
    tiny_translation: Path, make_tiny_translation: Any, pairs: Path, tmp_path: Path
) -> None:
    other = make_tiny_translation(tmp_path / "int8", precision="int8", seed=1)
    report = tmp_path / "bench.html"
    code, result = bench(
        str(tiny_translation), str(other), "--data", str(pairs), "--precision", "auto", "--max-concurrency", "2",
        "--num-beams", "2", "--max-new-tokens", "5", "--report", str(report),
    )  # fmt: skip
    assert code == 0, result
    assert [c["precision"] for c in result["candidates"]] == ["fp32", "int8"]
    for candidate in result["candidates"]:
        assert set(candidate["metrics"]) == {"bleu", "chrf", "signatures", "placeholders", "intervals"}
        assert candidate["disagreements"] == 0
        assert candidate["peak_memory_mb"] > 10
        assert candidate["first_answer_s"] > 0
        assert candidate["size_mb"] > 0
        (scenario,) = candidate["scenarios"]
        assert scenario["errors"] == 0
        assert list(scenario["seconds"]) == STAGES
        assert all(seconds > 0 for seconds in scenario["seconds"].values())
        assert sum(scenario["seconds"].values()) <= scenario["duration_s"]["median"]
        assert 0.99 < scenario["tokens_per_s"]["median"] / scenario["throughput_per_s"]["median"] < 5.01
    page = report.read_text(encoding="utf-8")
    for words in ("target tokens/s", "BLEU", "chrF", "Where the time goes", "detokenizing"):
        assert words in page
    assert "Confusion" not in page
    assert "macro-F1" not in page


def test_texts_alone_are_measured_without_grades(tiny_translation: Path, tmp_path: Path) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_text("Save the file.\n\nOpen the window.\n", encoding="utf-8")
    code, result = bench(str(tiny_translation), "--data", str(lines), "--max-concurrency", "1", "--max-new-tokens", "3")
    assert code == 0, result
    assert result["metrics"] is None
    assert result["texts"]["rows"] == 2
    assert result["tokens_per_s"] > 0


def test_rows_of_pairs_keep_their_references_together(pairs: Path) -> None:
    texts, references = read_rows(str(pairs), TASK, most=10, seed=1)
    assert references is not None
    assert set(zip(texts, references)) == {
        ("Save the file.", "Enregistrez le fichier."), ("Open {name}?", "Ouvrir {name} ?")
    }  # fmt: skip
    assert len(read_rows(str(pairs), TASK, most=1, seed=1)[0]) == 1


@pytest.mark.parametrize(
    ("option", "value", "what"), [("--label-column", "x", "translates"), ("--text-column", "en", "translates")]
)
def test_options_of_classifiers_are_refused(
    tiny_translation: Path, pairs: Path, option: str, value: str, what: str
) -> None:
    code, result = bench(str(tiny_translation), "--data", str(pairs), option, value)
    assert code == 2
    assert result["error"]["message"] == f"{option} does not apply to a model that {what}"


@pytest.mark.parametrize("option", ["--num-beams", "--max-new-tokens"])
def test_options_of_translators_are_refused(tiny_export: Path, tmp_path: Path, option: str) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "w1 w2"}\n')
    code, result = bench(str(tiny_export), "--data", str(tmp_path / "rows.jsonl"), option, "3")
    assert code == 2
    assert result["error"]["message"] == f"{option} does not apply to a model that classifies"


def test_too_many_beams_are_refused(tiny_translation: Path, pairs: Path) -> None:
    code, result = bench(str(tiny_translation), "--data", str(pairs), "--num-beams", "0")
    assert code == 2
    assert "num_beams is 0" in result["error"]["message"]


def test_chrf_is_plotted_against_speed(tmp_path: Path) -> None:
    result = run_bench([Candidate("s", Shouter())], TEXTS, TEXTS, [ClosedLoop(1)], rounds=1, seconds=0.05, warmup_s=0)
    write_report(result.to_json(), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert ">chrF</text>" in page
    assert "Where the time goes" not in page


def test_a_candidate_that_fails_alone_has_no_memory_figures() -> None:
    assert measure_alone(["-c", "raise SystemExit(3)"], {}, ["a"]) is None
