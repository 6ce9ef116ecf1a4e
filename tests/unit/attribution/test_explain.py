"""Attributions: by occlusion and by gradients, checked by deletion, and how they are shown."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import language_models
import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_answerer import write_checkpoint

import deploykit
from deploykit.attribution.explain import Measure, explain, log_odds, mean_deletion, probability, words_of_answers
from deploykit.attribution.words import Span, split_units, split_words, weights_of_words, without
from deploykit.errors import DataError, UsageError
from deploykit.report.explanation_page import explanation_lines, write_explanations
from deploykit.tasks.text_generation.chat_template import CHATML
from deploykit.tasks.translation.explain import explained_text as explain_translation
from deploykit.tasks.translation.facts import Translation
from deploykit.tasks.translation.translated import Translated

WEIGHTS = {"bad": -1.0, "plain": 0.0, "good": 1.0, "great": 3.0}


class _Additive:
    """A model whose log-odds are the sum of its words' weights."""

    measure: Measure = "log-odds"
    is_label = True

    def __init__(self, text: str, answer: str = "positive") -> None:
        self.text, self.answer = text, answer
        self.words: Sequence[Span] = split_words(text)

    def values(self, removed: Sequence[Collection[int]]) -> NDArray[np.float64]:
        weights = [WEIGHTS.get(self.text[a:b].lower(), 0.0) for a, b in self.words]
        return np.array([sum(w for i, w in enumerate(weights) if i not in gone) for gone in removed])

    def score(self, value: float) -> float:
        return probability(value)


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


def test_sentences_of_several_scripts() -> None:
    text = "Dr. Smith left (why?). It was 3.5 km…\nNo end\n\n北京。再见！"
    assert [text[a:b] for a, b in split_units(text, "sentence")] == [
        "Dr.",
        "Smith left (why?).",
        "It was 3.5 km…",
        "No end",
        "北京。",
        "再见！",
    ]
    assert split_units("a b", "word") == split_words("a b")
    assert split_units(" \n ", "sentence") == []


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


def test_numbers_have_words_for_both_directions_and_texts_have_one_list() -> None:
    class Number(_Additive):
        measure: Measure = "number"
        is_label = False

    class Text(_Additive):
        measure: Measure = "log-probability"
        is_label = False

    numbers = [explain(Number("a great and bad day", answer), "occlusion", check=False) for answer in ("2", "3")]
    assert words_of_answers(numbers) == {
        "a higher number": [("great", pytest.approx(3.0), 2)],
        "a lower number": [("bad", pytest.approx(-1.0), 2)],
    }
    texts = [explain(Text("a great day", answer), "occlusion", check=False) for answer in ("ls", "rm")]
    assert words_of_answers(texts) == {"any answer": [("great", pytest.approx(3.0), 2)]}


def test_the_deletion_check_asks_for_each_set_of_words_once() -> None:
    asked: list[tuple[int, ...]] = []

    class Counting(_Additive):
        def values(self, removed: Sequence[Collection[int]]) -> NDArray[np.float64]:
            asked.extend(tuple(words) for words in removed)
            return super().values(removed)

    explain(Counting("a great day"), "occlusion", check=True)
    checked = asked[4:]  # after the whole text, and each word removed
    assert len(checked) == len(set(checked))
    assert () in checked


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
        with pytest.raises(UsageError, match="--answer unknown is not a label"):
            model.explain(["w1"], answer="unknown")


def test_an_export_is_explained_by_occlusion_alone(tiny_export: Path) -> None:
    with deploykit.load(tiny_export, engine="onnxruntime") as model:
        found = model.explain(["w1 w2 w3 w4 w5 w6 w7 w8", "w9"], answer="neutral")
        assert [one.answer for one in found] == ["neutral", "neutral"]
        assert {one.method for one in found} == {"occlusion"}
        for one in found:
            assert one.deletion is not None
            assert one.deletion.gain >= 0
        whole, *others = model.predictor.scores(["w1 w2 w3 w4 w5 w6 w7 w8", "w2 w3 w4 w5 w6 w7 w8"])  # type: ignore[attr-defined]
        expected = log_odds(np.float64(whole[1:2])) - log_odds(np.float64(others[0][1:2]))
        assert found[0].words[0].weight == pytest.approx(float(expected[0]), abs=1e-4)
        with pytest.raises(UsageError, match="need a checkpoint"):
            model.explain(["w1"], method="gradients")


def test_words_of_a_prompt_weigh_by_what_the_answers_tokens_lose(tmp_path: Path) -> None:
    path = language_models.write_checkpoint(tmp_path / "m", template=CHATML)
    exported = language_models.write_export(tmp_path / "e", template=CHATML)
    with deploykit.load(path) as model, deploykit.load(exported, engine="onnxruntime") as graph:
        given = model.explain(["list the file here"], answer="ls -f .")[0]
        assert (given.answer, given.method, given.measure) == ("ls -f .", "occlusion", "log-probability")
        generator: Any = model.predictor
        ids = generator.tokenizer.tokenizer.encode("ls -f .", add_special_tokens=False).ids

        def logprob(text: str) -> float:
            import torch

            prompt = generator.tokenizer.encode_prompt([{"role": "user", "content": text}])
            with torch.inference_mode():
                logits = generator.torch_model(torch.tensor([[*prompt, *ids]])).logits[0].double().log_softmax(-1)
            return float(sum(logits[len(prompt) - 1 + i, token] for i, token in enumerate(ids)))

        whole = logprob("list the file here")
        assert [word.text for word in given.words] == ["list", "the", "file", "here"]
        left = ["the file here", "list file here", "list the here", "list the file"]
        assert [word.weight for word in given.words] == pytest.approx([whole - logprob(t) for t in left], abs=2e-3)
        assert given.score == pytest.approx(np.exp(whole / len(ids)), rel=1e-3)
        own, of_export = (m.explain(["list the file. And here?"], unit="sentence")[0] for m in (model, graph))
        assert [word.text for word in own.words] == ["list the file.", "And here?"]
        assert own.answer == of_export.answer == model.predict(["list the file. And here?"])[0].text
        assert [w.weight for w in of_export.words] == pytest.approx([w.weight for w in own.words], abs=1e-2)
        with pytest.raises(UsageError, match="need a checkpoint"):
            graph.explain(["list"], method="gradients")
        with pytest.raises(DataError, match="do not fit 256 tokens"):
            model.explain(["list"], answer="ls " * 300)


def test_gradients_of_a_prompt_add_up_to_what_its_words_add(tmp_path: Path) -> None:
    import torch

    path = language_models.write_checkpoint(tmp_path / "m", template=CHATML, max_position_embeddings=256)
    with deploykit.load(path) as model:
        (found,) = model.explain(["list the file here"], method="gradients", answer="ls -f .")
        generator: Any = model.predictor
        text, ids, places = generator.tokenizer.placed([{"role": "user", "content": "list the file here"}])
        begin = text.index("list the file here")
        answer = generator.tokenizer.tokenizer.encode("ls -f .", add_special_tokens=False).ids
        pad = generator.task.pad_token_id
        plain = [pad if a < begin + 18 and b > begin else i for i, (a, b) in zip(ids, places)]
        values = []
        with torch.inference_mode():
            for prompt in (ids, plain):
                logits = generator.torch_model(torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
                values.append(float(sum(logits[len(ids) - 1 + i, token] for i, token in enumerate(answer))))
        assert sum(w.weight for w in found.words) == pytest.approx(values[0] - values[1], rel=0.05, abs=0.02)
        assert found.method == "integrated gradients"


@pytest.mark.parametrize("family", ["marian", "m2m_100", "t5"])
def test_words_of_a_text_weigh_by_what_its_translation_loses(
    family: str, make_tiny_translation: Callable[..., Path], tmp_path: Path
) -> None:
    export = make_tiny_translation(tmp_path / "e", family, keep_checkpoint=tmp_path / "c", max_length=64)
    text = "Save the file. Do you want to open it?"
    with deploykit.load(tmp_path / "c") as model, deploykit.load(export, engine="onnxruntime") as graph:
        found, of_export = (m.explain([text])[0] for m in (model, graph))
        assert found.answer == of_export.answer == model.predict([text])[0].text
        assert [w.text for w in found.words[:4]] == ["Save", "the", "file", "."]
        assert [w.weight for w in of_export.words] == pytest.approx([w.weight for w in found.words], abs=2e-2)
        assert of_export.score == pytest.approx(found.score, rel=1e-3)
        translator: Any = model.predictor
        import torch

        with torch.inference_mode():

            def logprob(source: str) -> float:
                """The log-probability of the first sentence's translation, token by token."""
                (target,) = translator.generate_ids(translator.encode(["Save the file."]), model.task.generation)  # type: ignore[attr-defined]
                total, start = 0.0, [model.task.decoder_start_token_id]  # type: ignore[attr-defined]
                source_ids = torch.tensor(translator.encode([source]))
                for token in target:
                    logits = translator.model(input_ids=source_ids, decoder_input_ids=torch.tensor([start])).logits
                    total += float(logits[0, -1].double().log_softmax(-1)[token])
                    start.append(token)
                return total

            assert found.words[1].weight == pytest.approx(logprob("Save the file.") - logprob("Save file."), abs=1e-3)
        given = model.explain([text], answer="Enregistrer le fichier.", unit="sentence")[0]
        assert (given.answer, len(given.words)) == ("Enregistrer le fichier.", 2)
        with pytest.raises(UsageError, match="an export explains only its own"):
            graph.explain([text], answer="Oui")
        with pytest.raises(UsageError, match="only occlusion explains"):
            model.explain([text], method="gradients")
        with pytest.raises(DataError, match="the translation is empty"):
            model.explain([" "])


def test_a_translation_without_scores_is_explained_by_likeness() -> None:
    class Served:
        """Translates word by word, and drops "the"."""

        task = Translation("en", "fr", "marian", 9, 99, 99, 0, (1,), 0)

        def translate(self, texts: Sequence[str], *, scored: bool) -> list[Translated]:
            words = [[w.upper() for w in text.split() if w != "the"] for text in texts]
            return [Translated(" ".join(found), 0.0, 1, 1, "eos") for found in words]

    explained = explain_translation(Served(), "save the file now", None, "auto", "word")  # type: ignore[arg-type]
    found = explain(explained, "occlusion", check=True)
    assert found.answer == "SAVE FILE NOW"
    assert found.measure == "similarity"
    assert [round(w.weight, 3) for w in found.words] == [0.2, 0.0, 0.2, 0.2]
    with pytest.raises(UsageError, match="a served model explains only its own"):
        explain_translation(Served(), "save", "SAVE", "auto", "word")  # type: ignore[arg-type]


def test_another_answer_of_a_question_is_explained(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "m", sharp=True)
    pair = ("which w9", "w1 w2 w3 w4 w5. w6 w7 w8")
    with deploykit.load(path) as model:
        best, *others = model.predictor.answer(*pair, top_k=5)  # type: ignore[attr-defined]
        (found,) = model.explain([pair], answer=others[0].text.upper())
        assert (found.answer, found.score) == (others[0].text, pytest.approx(others[0].score, rel=2e-2))
        (sentences,) = model.explain([pair], unit="sentence")
        assert sentences.answer == best.text
        assert sentences.words[0].text == "which w9"
        kept = " ".join(word.text for word in sentences.words[1:])
        assert not {*kept.split()} & {*best.text.split()}, "the answer itself stays"
        with pytest.raises(DataError, match="is not among the 20 best answers"):
            model.explain([pair], answer="w100")


def test_a_unit_that_is_none_is_refused(tiny_export: Path) -> None:
    with deploykit.load(tiny_export) as model, pytest.raises(UsageError, match="--unit is 'page'"):
        model.explain(["w1"], unit="page")  # type: ignore[arg-type]
