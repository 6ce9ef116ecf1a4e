"""Attributions: by occlusion and by gradients, checked by deletion, and how they are shown."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import deploykit
from deploykit.attribution.explain import explain, log_odds, mean_deletion, probability, words_of_answers
from deploykit.attribution.words import Span, split_words, weights_of_words, without
from deploykit.errors import UsageError
from deploykit.report.explanation_page import explanation_lines, write_explanations

WEIGHTS = {"bad": -1.0, "plain": 0.0, "good": 1.0, "great": 3.0}


class _Additive:
    """A model whose log-odds are the sum of its words' weights."""

    is_number = False

    def __init__(self, text: str, answer: str = "positive") -> None:
        self.text, self.answer = text, answer
        self.words: Sequence[Span] = split_words(text)

    def values(self, removed: Sequence[Collection[int]]) -> NDArray[np.float64]:
        weights = [WEIGHTS.get(self.text[a:b].lower(), 0.0) for a, b in self.words]
        return np.array([sum(w for i, w in enumerate(weights) if i not in gone) for gone in removed])


def test_words_of_several_scripts() -> None:
    text = "Don't panic: 北京 is über-nice!"
    assert [text[a:b] for a, b in split_words(text)] == [
        "Don't",
        "panic",
        ":",
        "北",
        "京",
        "is",
        "über",
        "-",
        "nice",
        "!",
    ]
    words = split_words("a  bad day")
    assert without("a  bad day", [words[1]]) == "a day"
    assert without("a  bad day", words) == ""


def test_tokens_are_merged_to_the_words_that_they_are_part_of() -> None:
    # "un", "believ", "able" and a token that begins with the space before its word
    assert weights_of_words([(0, 12), (13, 17)], [(0, 2), (2, 8), (8, 12), (12, 17), (0, 0)], [1, 2, 3, 4, 9]) == [6, 4]


def test_occlusion_finds_the_weights_and_deletion_confirms_them() -> None:
    found = explain(_Additive("A great and good but bad day"), "occlusion", check=True)
    assert [(w.text, round(w.weight, 6)) for w in found.words if w.weight] == [("great", 3), ("good", 1), ("bad", -1)]
    assert found.score == pytest.approx(probability(3.0))
    assert found.deletion is not None
    assert found.deletion.gain > 0.1
    assert found.deletion.top[0] == found.deletion.random[0] == found.score


def test_deletion_refutes_wrong_weights() -> None:
    class Wrong(_Additive):
        def gradients(self) -> list[float]:
            return [-WEIGHTS.get(self.text[a:b].lower(), 0.0) for a, b in self.words]

    found = explain(Wrong("A great and good but bad day"), "gradients", check=True)
    assert found.deletion is not None
    assert found.deletion.gain < 0


def test_words_that_push_towards_an_answer_come_by_weight_and_number() -> None:
    texts = ["a great day", "great!", "so great", "a good day", "plain"]
    explanations = [explain(_Additive(text), "occlusion", check=False) for text in texts]
    assert words_of_answers(explanations) == {
        "positive": [("great", pytest.approx(3.0), 3), ("good", pytest.approx(1.0), 1)]
    }
    assert mean_deletion(explanations) is None


def test_log_odds_and_probability_are_inverse() -> None:
    assert [probability(v) for v in log_odds(np.array([0.2, 0.5, 0.999]))] == pytest.approx([0.2, 0.5, 0.999])
    assert np.isfinite(log_odds(np.array([0.0, 1.0]))).all()


def test_an_explanation_is_shown_in_colours(tmp_path: Path) -> None:
    explanations = [explain(_Additive("A <great> and bad day"), "occlusion", check=True)]
    _, coloured, top = explanation_lines(explanations[0])
    assert "\x1b[38;2;18;161;80mgreat\x1b[0m" in coloured
    assert top.split()[:2] == ["great", "+3.00"]
    write_explanations("m", explanations, tmp_path / "page.html", by_answer=True)
    page = (tmp_path / "page.html").read_text()
    assert "&lt;" in page
    assert "rgba(18, 161, 80, 0.60)" in page
    assert "rgba(217, 48, 37, 0.20)" in page
    assert "without random words" in page


@pytest.mark.parametrize("family", ["bert", "roberta-prelayernorm"])
def test_gradients_add_up_to_what_the_text_adds_to_its_padding(
    family: str, make_tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    import torch

    path = make_tiny_checkpoint(tmp_path / "model", family)
    with deploykit.load(path) as model:
        (found,) = model.explain(["w1 w20 w33 w4 w1"], method="gradients")
        tokens = [2, 5, 24, 37, 8, 5, 3]
        with torch.inference_mode():
            ids = torch.tensor([tokens, [2, 0, 0, 0, 0, 0, 3]])
            embedded = model.predictor.model.get_input_embeddings()(ids)  # type: ignore[attr-defined]
            handle = model.predictor.model.get_input_embeddings().register_forward_hook(lambda *_: embedded)  # type: ignore[attr-defined]
            logits = model.predictor.model(ids[:1].expand(2, -1)).logits  # type: ignore[attr-defined]
            handle.remove()
        index = model.task.labels.index(found.answer)  # type: ignore[attr-defined]
        odds = logits[:, index] - logits[:, 1 - index]
        assert sum(word.weight for word in found.words) == pytest.approx(float(odds[0] - odds[1]), rel=0.05, abs=0.02)
        assert found.method == "integrated gradients"
        (removed,) = model.explain(["w1 w20 w33 w4 w1"], method="occlusion")
        assert removed.answer == found.answer
        assert removed.score == pytest.approx(found.score, abs=1e-5)
        with pytest.raises(UsageError, match="--label unknown is no label"):
            model.explain(["w1"], label="unknown")


def test_an_export_is_explained_by_occlusion_alone(tiny_export: Path) -> None:
    with deploykit.load(tiny_export, engine="onnxruntime") as model:
        found = model.explain(["w1 w2 w3 w4 w5 w6 w7 w8", "w9"], label="neutral")
        assert [one.answer for one in found] == ["neutral", "neutral"]
        assert {one.method for one in found} == {"occlusion"}
        for one in found:
            assert one.deletion is not None
            assert one.deletion.gain >= 0
        whole, *others = model.predictor.scores(["w1 w2 w3 w4 w5 w6 w7 w8", "w2 w3 w4 w5 w6 w7 w8"])  # type: ignore[attr-defined]
        expected = log_odds(np.float64(whole[1:2])) - log_odds(np.float64(others[0][1:2]))
        assert found[0].words[0].weight == pytest.approx(float(expected[0]), abs=1e-4)
        with pytest.raises(UsageError, match="a checkpoint alone"):
            model.explain(["w1"], method="gradients")


def test_a_task_without_explanations_says_so(tiny_translation: Path) -> None:
    with deploykit.load(tiny_translation) as model, pytest.raises(UsageError, match="has no explanations"):
        model.explain(["Save the file."])
