from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
from sklearn import metrics as sk

from deploykit.errors import MissingDependencyError
from deploykit.tasks.classification.facts import Classification
from deploykit.tasks.classification.metrics import classification_metrics
from deploykit.tasks.translation.metrics import (
    measure_of,
    metrics_with_intervals,
    placeholders,
    translation_metrics,
)
from deploykit.tasks.translation.metrics_text import metrics_text, result_text


def random_case(labels: int, *, multi_label: bool, seed: int) -> tuple[Classification, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    task = Classification(tuple(f"l{i}" for i in range(labels)), 16, 0, multi_label=multi_label)
    scores = rng.random((97, labels)).astype(np.float32)
    if multi_label:
        return task, rng.random((97, labels)) < 0.3, scores
    truth = np.zeros((97, labels), bool)
    truth[np.arange(97), rng.integers(0, labels - 1, 97)] = True  # the last label never occurs
    return task, truth, scores / scores.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("seed", range(3))
def test_single_label_metrics_agree_with_scikit_learn(seed: int) -> None:
    task, truth, scores = random_case(4, multi_label=False, seed=seed)
    ours = classification_metrics(task, truth, scores)
    y, a = truth.argmax(axis=1), scores.argmax(axis=1)
    assert ours["accuracy"] == pytest.approx(sk.accuracy_score(y, a))
    assert ours["macro_f1"] == pytest.approx(sk.f1_score(y, a, average="macro", zero_division=0))
    assert ours["macro_precision"] == pytest.approx(sk.precision_score(y, a, average="macro", zero_division=0))
    assert ours["macro_recall"] == pytest.approx(sk.recall_score(y, a, average="macro", zero_division=0))
    assert ours["confusion_matrix"] == sk.confusion_matrix(y, a, labels=range(4)).tolist()


@pytest.mark.parametrize("seed", range(3))
def test_multi_label_metrics_agree_with_scikit_learn(seed: int) -> None:
    task, truth, scores = random_case(3, multi_label=True, seed=seed)
    ours = classification_metrics(task, truth, scores)
    answers = scores >= 0.5
    assert ours["accuracy"] == pytest.approx(sk.accuracy_score(truth, answers))
    assert ours["macro_f1"] == pytest.approx(sk.f1_score(truth, answers, average="macro", zero_division=0))
    assert ours["micro_f1"] == pytest.approx(sk.f1_score(truth, answers, average="micro", zero_division=0))
    expected = sk.multilabel_confusion_matrix(truth, answers)
    assert [ours["confusion_matrix"][label] for label in task.labels] == expected.tolist()


def test_intervals_of_translations_are_those_of_sacrebleus_bootstrap() -> None:
    random = np.random.default_rng(0)
    words = [f"w{i}" for i in range(30)]
    references = [" ".join(random.choice(words, 8)) for _ in range(60)]
    hypotheses = [" ".join(word if random.random() < 0.8 else "x" for word in text.split()) for text in references]
    metrics = metrics_with_intervals(hypotheses, references, references, "fr")
    measured = measure_of(hypotheses, references, "fr")(np.ones(60))
    for name, metric in (("bleu", sacrebleu.BLEU()), ("chrf", sacrebleu.CHRF())):
        assert measured[name] == pytest.approx(metrics[name], abs=1e-4)
        theirs = metric.corpus_score(hypotheses, [references], n_bootstrap=1000)
        low, high = metrics["intervals"][name]
        assert (low, high) == pytest.approx((theirs._mean - theirs._ci, theirs._mean + theirs._ci), abs=theirs._ci / 4)
    assert f"[{metrics['intervals']['bleu'][0]:.2f}, " in metrics_text({"": metrics})


def test_calibration_error_is_the_gap_between_confidence_and_accuracy() -> None:
    task = Classification(("a", "b"), 16, 0)
    scores = np.tile(np.array([[0.9, 0.1]], np.float32), (10, 1))
    truth = np.zeros((10, 2), bool)
    truth[:6, 0] = truth[6:, 1] = True
    assert classification_metrics(task, truth, scores)["expected_calibration_error"] == pytest.approx(0.3, abs=1e-6)


def test_bleu_and_chrf_are_sacrebleus_with_its_signature() -> None:
    hypotheses, references = ["le chat est là", "ouvrez le fichier %s"], ["le chat est ici", "ouvrez le fichier %s"]
    ours = translation_metrics(hypotheses, references, ["the cat is here", "open the file %s"], "fr")
    assert ours["bleu"] == pytest.approx(sacrebleu.corpus_bleu(hypotheses, [references]).score, abs=1e-4)
    assert ours["chrf"] == pytest.approx(sacrebleu.corpus_chrf(hypotheses, [references]).score, abs=1e-4)
    assert ours["signatures"]["bleu"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert ours["signatures"]["chrf"].startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:")


@pytest.mark.parametrize(
    ("target", "texts", "tokenizers"),
    [
        ("zh", ["我爱你们所有的人", "打开文件夹"], ["zh"]),
        ("zho_Hans", ["我爱你们所有的人", "打开文件夹"], ["zh"]),
        ("jpn_Jpan", ["ファイルを保存できません", "新しいフォルダを開く"], ["ja-mecab", "char"]),
        ("th", ["ไม่สามารถบันทึกไฟล์ได้", "เปิดโฟลเดอร์ใหม่"], ["flores200", "char"]),
        ("khm_Khmr", ["មិនអាចរក្សាទុកឯកសារបានទេ"], ["flores200", "char"]),
        ("ko", ["파일을 저장할 수 없습니다 다시 해보십시오"], ["13a"]),
        ("fr", ["Enregistrer", "Ouvrir %s"], ["13a"]),
    ],
)
def test_identical_texts_score_100_and_others_less_in_every_script(
    target: str, texts: list[str], tokenizers: list[str]
) -> None:
    same = translation_metrics(texts, texts, texts, target)
    assert (same["bleu"], same["chrf"]) == (pytest.approx(100), pytest.approx(100))
    assert any(f"tok:{name}|" in same["signatures"]["bleu"] for name in tokenizers)
    assert 0 < translation_metrics([text[:-2] for text in texts], texts, texts, target)["chrf"] < 100


def test_the_signature_is_on_the_console() -> None:
    metrics = translation_metrics(["打开文件夹吧"], ["打开文件夹"], ["open"], "zh")
    assert f"bleu signature: {metrics['signatures']['bleu']}" in metrics_text({"": metrics})
    samples = [{"source": "Save", "reference": "", "translation": "rea" * 200}]
    text = result_text({"test": metrics, "samples": samples}, "test")
    assert text.endswith(f"reference:   \ntranslation: {'rea' * 100}…"), "a long answer is cut"


def test_references_are_measured_as_given(tmp_path: Path) -> None:
    from deploykit.tasks.translation.evaluate import translated_rows
    from deploykit.tasks.translation.facts import Translation

    task = Translation("en", "fr", "marian", 9, 9, 9, 0, (1,), 0)
    decomposed = "e\u0301te\u0301"
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"source": "summer", "target": decomposed}) + "\n")
    [pair] = translated_rows(str(tmp_path / "pairs.jsonl"), task).pairs
    assert pair.target == decomposed


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("%s of %(name)s, %1$d at %.2f%%", ["%s", "%(name)s", "%1$d", "%.2f", "%%"]),
        ("{} {0} {user.name} {n:.2f} ${x} {{ v }}", ["{}", "{0}", "{user.name}", "{n:.2f}", "${x}", "{{ v }}"]),
        ('<b>x</b> <a href="u">y</a><br/>', ["<b>", "</b>", "<a>", "</a>", "<br/>"]),
        ("Tom &amp; Jerry &#39;", ["&amp;", "&#39;"]),
        ("100% sure, 50 % done, a < b > c, if (x) { return; } AT&T;s", []),
    ],
)
def test_placeholders_are_distinguished_from_text(text: str, found: list[str]) -> None:
    assert sorted(placeholders(text).elements()) == sorted(found)


def test_lost_and_altered_placeholders_are_counted_and_shown() -> None:
    sources = ["%s files in {name}", "<b>Save</b>", "plain"]
    translated = ["fichiers %d dans {name}", "<b>Enregistrer</b>", "simple"]
    found = translation_metrics(translated, translated, sources, "fr")["placeholders"]
    assert (found["checked"], found["kept"]) == (4, 3)
    assert found["examples"] == [{"source": sources[0], "translation": translated[0], "lost": ["%s"]}]


def test_without_sacrebleu_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.bleu", None)
    with pytest.raises(MissingDependencyError, match="finetune"):
        translation_metrics(["a"], ["a"], ["a"], "fr")
