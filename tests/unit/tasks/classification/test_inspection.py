"""The parts of ``evaluate --report`` on rows whose truth is known."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from deploykit.errors import UsageError
from deploykit.inspection.drift import drift, ks_p_value, ks_statistic
from deploykit.tasks.classification.facts import Classification
from deploykit.tasks.classification.inspection.confidence import calibration, fit_temperature, rescaled
from deploykit.tasks.classification.inspection.flips import ENGLISH, count_flips, read_swaps
from deploykit.tasks.classification.inspection.label_errors import likely_label_errors, tied_words
from deploykit.tasks.classification.inspection.page import write_report
from deploykit.tasks.classification.inspection.report import drift_properties
from deploykit.tasks.classification.inspection.slices import sliced_metrics
from deploykit.tasks.classification.metrics import classification_metrics
from deploykit.tasks.classification.rows import Example

TASK = Classification(("bad", "good"), 16, 0)


def _rows(count: int, wrong: Sequence[int] = ()) -> tuple[list[Example], NDArray[np.bool_], NDArray[np.float32]]:
    """Rows with labels in turn, answered right with 0.9 except for the ``wrong`` ones."""
    truth = np.eye(2, dtype=bool)[np.arange(count) % 2]
    scores = np.where(truth, 0.9, 0.1).astype(np.float32)
    scores[list(wrong)] = scores[list(wrong)][:, ::-1]
    labels = [TASK.labels[i % 2] for i in range(count)]
    return [Example(f"text number {i}", label, f"rows.csv:{i}") for i, label in enumerate(labels)], truth, scores


def test_slices_come_worst_first_with_those_worse_than_chance_marked() -> None:
    examples, truth, scores = _rows(200, wrong=range(30))
    source = ["mail" if i < 40 else "chat" for i in range(200)]
    number = [str(i) for i in range(200)]
    found = sliced_metrics(TASK, examples, truth, scores, {"source": source, "number": number})
    by_name = {one["slice"]: one for one in found}
    assert [one["accuracy"] for one in found] == sorted(one["accuracy"] for one in found)
    assert by_name["source: mail"] == {**by_name["source: mail"], "rows": 40, "accuracy": 0.25, "worse": True}
    assert not by_name["source: chat"]["worse"]
    assert by_name["number: 0 to 49"]["accuracy"] == pytest.approx(0.4)
    assert {"label: bad", "label: good"} <= set(by_name)
    low, high = by_name["source: mail"]["intervals"]["accuracy"]
    assert low < 0.25 < high < 0.5
    assert not any(name.startswith("duplicates") for name in by_name), "no text is there twice"


def test_duplicates_are_a_slice() -> None:
    examples, truth, scores = _rows(60)
    twice = [dataclasses.replace(e, text="the same") if i < 12 else e for i, e in enumerate(examples)]
    found = {one["slice"]: one["rows"] for one in sliced_metrics(TASK, twice, truth, scores, {})}
    assert found["duplicates: yes"] == 12


@pytest.mark.parametrize("multi_label", [False, True])
def test_the_temperature_of_a_model_that_is_too_sure_is_found(multi_label: bool) -> None:
    random = np.random.default_rng(0)
    task = dataclasses.replace(TASK, multi_label=multi_label)
    logits = random.normal(size=(4000, 2)).astype(np.float32) * 1.5
    honest = task.scores(logits)
    if multi_label:
        truth = random.random((4000, 2)) < honest
    else:
        truth = np.eye(2, dtype=bool)[(random.random(4000) < honest[:, 1]).astype(int)]
    too_sure = task.scores(3 * logits)
    temperature = fit_temperature(task, truth, too_sure)
    assert temperature == pytest.approx(3, rel=0.1)
    corrected = dataclasses.replace(task, temperature=temperature).scores(3 * logits)
    assert np.abs(corrected - honest).max() < 0.03
    assert np.allclose(rescaled(task, too_sure, temperature), corrected, atol=1e-4)
    assert task.decide(corrected) == task.decide(too_sure), "no answer changes"
    found = calibration(task, truth, too_sure)
    assert found["error"] == classification_metrics(task, truth, too_sure)["expected_calibration_error"]
    assert found["error_after"] < found["error"] / 3
    assert sum(one["rows"] for one in found["reliability"]) == (8000 if multi_label else 4000)


def test_wrong_labels_are_found() -> None:
    examples, truth, scores = _rows(100)
    scores += np.random.default_rng(0).uniform(-0.05, 0.05, (100, 1)).astype(np.float32) * [[1, -1]]
    for row in (7, 42):
        truth[row] = ~truth[row]
        examples[row] = dataclasses.replace(examples[row], label=TASK.labels[int(truth[row].argmax())])
    found = likely_label_errors(TASK, examples, truth, scores)
    assert {one["origin"] for one in found} <= {"rows.csv:7", "rows.csv:42"}
    assert found
    assert found[0]["likely"] != found[0]["label"]


def test_a_word_that_stands_with_one_label_is_found() -> None:
    examples, _, _ = _rows(200)
    marked = [dataclasses.replace(e, text=f"{e.text} sent from berlin") if e.label == "good" else e for e in examples]
    found = tied_words(TASK, marked)
    assert {(one["word"], one["label"]) for one in found} == {(w, "good") for w in ("sent", "from", "berlin")}
    assert tied_words(TASK, examples) == []


class _Biased:
    task = TASK

    def scores(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return np.float32([[0.8, 0.2] if " she " in f" {text.lower()} " else [0.2, 0.8] for text in texts])


def test_answers_that_depend_on_gender_flip(tmp_path: Path) -> None:
    texts = ["She came late.", "Did HE come? He did.", "SHE left", "Nobody came"]
    examples = [Example(text, "good", str(i)) for i, text in enumerate(texts)]
    answers = TASK.decide(_Biased().scores(texts))
    found = count_flips(_Biased(), examples, answers, {"gender": ENGLISH["gender"]})  # type: ignore[arg-type]
    assert [(one["from"], one["to"], one["texts"], one["flips"]) for one in found] == [
        ("female", "male", 2, 2), ("male", "female", 1, 1),
    ]  # fmt: skip
    assert found[0]["examples"] == ["He came late.", "HE left"]
    assert found[0]["changes"] == {"bad → good": 2}
    own = tmp_path / "swaps.toml"
    own.write_text('[team]\nred = ["She"]\nblue = ["it"]\n')
    (line, *_) = count_flips(_Biased(), examples, answers, read_swaps(own))  # type: ignore[arg-type]
    assert (line["group"], line["texts"]) == ("team", 2)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[a", "is not TOML"),
        ("a = 1", "the group 'a' does not have two members"),
        ('[a]\nb = ["x"]', "the group 'a' does not have two members"),
        ('[a]\nb = ["x"]\nc = ["y", "z"]', "have 1, 2 words"),
        ('[a]\nb = [""]\nc = ["y"]', "the group 'a' does not have two members"),
    ],
)
def test_a_file_of_swaps_without_sense_is_refused(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "swaps.toml").write_text(text)
    with pytest.raises(UsageError) as refused:
        read_swaps(tmp_path / "swaps.toml")
    assert says in str(refused.value)


def test_of_equal_words_the_first_counterpart_is_taken_and_letters_that_match_without_case_are_left() -> None:
    examples = [Example("A Chinese cook", "good", "1"), Example("KIZ geldi", "good", "2")]
    swaps = {
        "origin": {"c": ("chinese", "chinese"), "g": ("german", "germans")},
        "kin": {"a": ("kız",), "b": ("oğlan",)},
    }
    (line, *_) = count_flips(_Recorded(), examples, ["good", "good"], swaps)  # type: ignore[arg-type]
    assert (line["from"], line["texts"]) == ("c", 1)
    assert _Recorded.texts[0] == "A German cook"


class _Recorded:
    """Answers "good" to all, and keeps what it was asked."""

    task = TASK
    texts: ClassVar[list[str]] = []

    def scores(self, texts: Sequence[str]) -> NDArray[np.float32]:
        self.texts.extend(texts)
        return np.float32([[0.2, 0.8]] * len(texts))


def test_the_built_in_swaps_are_counterparts() -> None:
    for members in ENGLISH.values():
        assert len({len(words) for words in members.values()}) == 1


def test_the_kolmogorov_smirnov_test_agrees_with_scipy() -> None:
    random = np.random.default_rng(0)
    for shift in (0.0, 0.1, 0.3):
        a, b = random.normal(size=400), random.normal(shift, size=300)
        expected = stats.ks_2samp(a, b, method="asymp")
        assert ks_statistic(a, b) == pytest.approx(expected.statistic)
        assert ks_p_value(ks_statistic(a, b), 400, 300) == pytest.approx(expected.pvalue, rel=0.1, abs=1e-3)


def test_drift_is_found_in_rows_that_differ_and_not_in_others() -> None:
    random = np.random.default_rng(0)

    def rows(count: int, words: Sequence[str], sure: float) -> tuple[list[str], NDArray[np.float32]]:
        good = np.clip(random.normal(sure, 0.05, count), 0, 1)
        texts = [" ".join(random.choice(words, 10)) for _ in range(count)]
        return texts, np.stack([1 - good, good], axis=1).astype(np.float32)

    words = [f"w{i}" for i in range(50)]
    old, same, other = rows(300, words, 0.8), rows(200, words, 0.8), rows(200, [*words, *["covid"] * 20], 0.6)
    unchanged = drift(old[0], same[0], drift_properties(TASK, old[1], same[1]))
    assert not any(test["drifts"] for test in unchanged["tests"])
    found = drift(old[0], other[0], drift_properties(TASK, old[1], other[1]))
    drifting = {test["property"] for test in found["tests"] if test["drifts"]}
    assert drifting == {"share of unknown words", "confidence", "probability of bad", "probability of good"}
    assert [one["word"] for one in found["words"]] == ["covid"]
    assert found["unknown_words"] == 1


def test_a_page_of_numbers_has_no_parts_of_labels(tmp_path: Path) -> None:
    from deploykit.tasks.classification.resampling import metrics_with_intervals

    task = Classification(("stars",), 16, 0, regression=True)
    random = np.random.default_rng(0)
    truth = random.random((60, 1)).astype(np.float32)
    scores = truth + random.normal(0, 0.1, (60, 1)).astype(np.float32)
    examples = [Example(" ".join(["w"] * (i % 9 + 1)), str(v), str(i)) for i, v in enumerate(truth[:, 0])]
    record: dict[str, Any] = {
        "labels": ["stars"], "metrics": metrics_with_intervals(task, truth, scores), "rows": 60,
        "slices": sliced_metrics(task, examples, truth, scores, {}),
    }  # fmt: skip
    write_report("stars", record, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == 1
    assert [one["rmse"] for one in record["slices"]] == sorted((one["rmse"] for one in record["slices"]), reverse=True)
