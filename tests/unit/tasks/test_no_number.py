"""A text for which a model computes NaN or infinity gets an error; other texts get their answers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from language_models import random_model
from language_models import tokenizer as byte_tokenizer
from numpy.typing import NDArray
from tiny_answerer import write_checkpoint
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForQuestionAnswering
from translators import Case, V, case, results

from deploykit.data.reading import AS_FOUND
from deploykit.errors import DataError
from deploykit.runtime.decoding import Decoder, Sentence
from deploykit.runtime.finite import NoNumberError
from deploykit.runtime.generation import Generation
from deploykit.runtime.sampler import Sampler
from deploykit.runtime.sampling import Sampling
from deploykit.runtime.search import Finished
from deploykit.runtime.tokenizer import TextTokenizer
from deploykit.tasks.answering import answer_rows, rows_of
from deploykit.tasks.classification.facts import Classification
from deploykit.tasks.classification.predictor import Classifier
from deploykit.tasks.protocol import Evaluation
from deploykit.tasks.question_answering.checkpoint import TorchAnswerer
from deploykit.tasks.question_answering.evaluate import evaluate, found_for, labelled_questions
from deploykit.tasks.question_answering.facts import as_text
from deploykit.tasks.text_generation.checkpoint import TorchGenerator, checkpoint_facts
from deploykit.tasks.text_generation.evaluate import evaluate_file
from deploykit.tasks.text_generation.generator import Generated, LocalGenerator
from deploykit.tasks.translation.predictor import Job, Translator

__all__ = ["case"]

TOLD = "the model computed no number for this text (NaN or infinity)"
VALUES = [math.nan, math.inf, -math.inf]


class Overflowing:
    """An encoder whose logits are ``value`` for texts with the token 3."""

    token_budget = 64
    computes_padding = True

    def __init__(self, value: float) -> None:
        self._value = value

    def run(self, inputs: Mapping[str, NDArray[np.int64]]) -> list[NDArray[np.float32]]:
        logits = np.tile(np.float32([0.0, 1.0]), (len(inputs["input_ids"]), 1))
        logits[(inputs["input_ids"] == 3).any(axis=1), 1] = self._value
        return [logits]


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("kind", ["labels", "several", "number"])
def test_a_text_without_scores_fails_alone(value: float, kind: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"[PAD]": 0, "good": 1, "fine": 2, "bad": 3}, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    task = Classification(("no", "yes"), 8, 0, multi_label=kind == "several", regression=kind == "number")
    classifier = Classifier(task, TextTokenizer(tmp_path / "tokenizer.json", 8), Overflowing(value))
    records = [row.to_json() for row in answer_rows(classifier, rows_of(["good", "fine bad", "fine"], task))]
    assert [record.get("error") for record in records] == [None, TOLD, None]
    assert np.isfinite(classifier.logits(["good", "bad"])[0]).all(), "what an export measures includes broken rows"


@pytest.fixture
def answerer(tmp_path: Path) -> TorchAnswerer:
    """A random model for question answering that overflows at the word w7."""
    import torch

    folder = write_checkpoint(tmp_path / "model", sharp=True)
    model = AutoModelForQuestionAnswering.from_pretrained(folder)
    found = TorchAnswerer.load(folder)
    with torch.no_grad():
        (token,) = found.tokenizer.question("w7")
        model.bert.embeddings.word_embeddings.weight[token] = 3e38
    model.save_pretrained(folder)
    return TorchAnswerer.load(folder)


def test_a_question_without_logits_fails_alone(answerer: TorchAnswerer) -> None:
    long = " ".join(["w1 w2 w3"] * 40)
    pairs = [("w1 ?", "w2 w3 w4"), ("w1 ?", "w2 w7"), ("w7 ?", "w2"), ("w2 ?", f"{long} w7 {long}"), ("w3 ?", long)]
    found = answerer.try_all(pairs)
    assert [isinstance(one, NoNumberError) for one in found] == [False, True, True, True, False]
    assert found[0] == answerer.try_all(pairs[:1])[0], "the rows beside it change no answer"
    records = [
        row.to_json() for row in answer_rows(answerer, rows_of([as_text(*pair) for pair in pairs], answerer.task))
    ]
    assert [record.get("error") for record in records] == [None, TOLD, TOLD, TOLD, None]
    with pytest.raises(DataError, match="computed no number"):
        answerer.answer(*pairs[1])


def test_no_number_is_no_right_answer_to_a_question_that_has_none(answerer: TorchAnswerer) -> None:
    found = found_for(answerer, [("w1 ?", "w2 w7"), ("w1 " * 99, "w2")], lambda done, of: None)
    assert [one.decide(threshold).text == "" for one in found for threshold in (None, 0.0)] == [
        False,
        False,
        True,
        True,
    ]


def test_an_evaluated_question_without_logits_is_named_and_the_others_are_measured(
    answerer: TorchAnswerer, tmp_path: Path
) -> None:
    rows = [{"question": "w1 ?", "context": f"w2 {word} w3", "answer": "w3"} for word in ("w4", "w7", "w5")]

    def evaluated(name: str, some: Sequence[Mapping[str, str]]) -> Evaluation:
        path = tmp_path / name
        path.write_text("\n".join(map(json.dumps, some)), encoding="utf-8")
        return evaluate(answerer, labelled_questions(str(path)))

    found, alone = evaluated("rows.jsonl", rows), evaluated("good.jsonl", rows[::2])
    assert found.metrics == alone.metrics
    assert (found.rows, found.problems) == (2, (f"rows.jsonl:2: {TOLD}",))
    with pytest.raises(DataError, match=r"bad\.jsonl:1: the model computed no number"):
        evaluated("bad.jsonl", rows[1:2])


class Broken:
    """A language model whose logits are ``value`` after the token ``after``."""

    def __init__(self, model: Any, value: float, tokens: slice, after: int = 7) -> None:
        self._model, self._value, self._tokens, self._after = model, value, tokens, after

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    @property
    def rows(self) -> int:
        return int(self._model.rows)

    def feed(self, ids: Sequence[int], wanted: Sequence[int]) -> NDArray[np.float32]:
        logits = self._model.feed(ids, wanted).copy()
        logits[[i for i, place in enumerate(wanted) if self._after in ids[: place + 1]], self._tokens] = self._value
        return logits

    def step(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        logits = self._model.step(tokens).copy()
        logits[tokens == self._after, self._tokens] = self._value
        return logits


@pytest.fixture(scope="module")
def language_model() -> TorchGenerator:
    model, own = random_model("gpt2"), byte_tokenizer()
    return TorchGenerator(model, own, checkpoint_facts(model.config, model.generation_config, own))


@pytest.mark.parametrize(
    ("value", "tokens"), [(math.nan, slice(None)), (math.inf, slice(9, 10)), (math.nan, slice(9, 10))]
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.0},
        {"temperature": 1.0, "top_k": 3},
        {"logprobs": 2},
        {"n": 2, "temperature": 1.0},
        {"num_beams": 3},
    ],
)
def test_a_prompt_without_logits_fails_alone(
    language_model: TorchGenerator, value: float, tokens: slice, options: dict[str, Any]
) -> None:
    sampling = Sampling(max_new_tokens=4, ignore_eos=True, **options)
    generator = LocalGenerator(
        language_model.task, language_model.tokenizer, Broken(language_model.model, value, tokens)
    )
    generator.prompt_ids = lambda prompt: [int(token) for token in prompt.split()]  # type: ignore[method-assign,union-attr]
    good, bad = "30 31 32", "30 7 31"
    found = generator.reply([good, bad, good], sampling)
    assert isinstance(found[1], NoNumberError)
    assert found[0] == found[2] == language_model_reply(language_model, good, sampling)
    assert generator.decoder.idle
    assert generator.model.rows == 0
    with pytest.raises(NoNumberError):
        list(generator.stream(bad, sampling))


def test_an_evaluated_row_without_logits_is_named_and_the_others_are_measured(
    tmp_path: Path,
) -> None:
    own = byte_tokenizer("{% for message in messages %}{{ message.content }}\n{% endfor %}")
    random = random_model("gpt2")
    language_model = TorchGenerator(random, own, checkpoint_facts(random.config, random.generation_config, own))
    (token,) = language_model.tokenizer.tokenizer.encode("x").ids
    model = Broken(language_model.model, math.nan, slice(None), after=token)
    generator = LocalGenerator(language_model.task, language_model.tokenizer, model)
    sampling = Sampling(max_new_tokens=4, ignore_eos=True)

    def evaluated(name: str, rows: Sequence[tuple[str, str]]) -> Evaluation:
        path = tmp_path / name
        lines = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in rows]
        path.write_text("\n".join(lines), encoding="utf-8")
        return evaluate_file(
            generator, str(path), sampling, split="test", reading=AS_FOUND, columns={}, progress=lambda done, of: None
        )

    good, late = [("list", "ls"), ("show", "cat")], ("copy", "xcp")
    found = evaluated("rows.jsonl", [good[0], ("x", "rm"), good[1], late])
    alone = evaluated("good.jsonl", good)
    assert found.metrics == alone.metrics
    assert found.rows == alone.rows == 2
    assert found.problems == tuple(f"rows.jsonl:{line}: {TOLD}" for line in (2, 4))
    with pytest.raises(DataError, match=r"bad\.jsonl:1: the model computed no number"):
        evaluated("bad.jsonl", [("x", "rm"), late])


def language_model_reply(generator: TorchGenerator, prompt: str, sampling: Sampling) -> list[Generated]:
    return generator.generate([[int(token) for token in prompt.split()]], sampling)[0]


def test_log_probabilities_of_a_prompt_without_logits_are_an_error(language_model: TorchGenerator) -> None:
    generator = LocalGenerator(
        language_model.task, language_model.tokenizer, Broken(language_model.model, math.nan, slice(None))
    )
    sampling = Sampling(max_new_tokens=0, logprobs=0)
    queries = [generator.query(prompt, sampling, prompt_logprobs=True) for prompt in ([30, 7, 31], [30, 31, 32])]
    for query in queries:
        generator.decoder.add(query)
    done = []
    while not generator.decoder.idle:
        done += generator.decoder.step()
    assert set(map(id, done)) == set(map(id, queries))
    assert [isinstance(query.error, NoNumberError) for query in queries] == [True, False]


@pytest.mark.parametrize("value", VALUES)
def test_a_sampler_chooses_no_token_of_logits_that_are_no_numbers(value: float) -> None:
    for temperature in (0.0, 1.0):
        with pytest.raises(NoNumberError):
            Sampler(Sampling(temperature=temperature), [1]).choose(np.full(50, value, np.float32))


@pytest.mark.parametrize("scored", [True, False])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_sentence_without_logits_fails_alone(
    case: Callable[[str], Case], value: float, beams: int, scored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = case("marian")
    generation = Generation(beam_size=beams, max_length=12)

    def decoded() -> list[tuple[list[int], float]]:
        sentences = [Sentence(source, generation, scored=scored) for source in c.sources[:8]]
        Decoder(c.engine, c.task, max_rows=32).run(sentences)
        return results(sentences)

    expected = decoded()
    step, broken_after = type(c.engine).step, [-1]

    def overflowing(self: Any, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        logits = step(self, tokens)
        logits[tokens == broken_after[0]] = value
        return logits

    monkeypatch.setattr(type(c.engine), "step", overflowing)
    for broken_after[0] in range(1, V):
        found = decoded()
        if {math.isnan(score) for _, score in found} == {True, False}:
            break
    else:
        pytest.fail("each token is in all sentences, or in none")
    assert [one for one in found if not math.isnan(one[1])] == [
        one for one, (_, score) in zip(expected, found) if not math.isnan(score)
    ]
    broken = next(one for one in found if math.isnan(one[1]))
    with pytest.raises(NoNumberError):
        Translator(c.task, _NoTokenizer(), Decoder(c.engine, c.task)).result(Job([_done(*broken)], [""]))


def _done(tokens: list[int], score: float) -> Sentence:
    return Sentence([1], Generation(), result=Finished(np.array(tokens, np.int64), score))


class _NoTokenizer:
    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        raise AssertionError

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        raise AssertionError
