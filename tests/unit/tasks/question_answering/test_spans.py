"""Windows, positions and spans equal transformers' tokenization and QuestionAnsweringPipeline."""

from __future__ import annotations

import dataclasses
import json
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_answerer import CONTEXT, FAMILIES, WORDS, write_checkpoint
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from deploykit.errors import ArtifactError, DataError
from deploykit.tasks.question_answering import predictor, windows
from deploykit.tasks.question_answering.checkpoint import TorchAnswerer
from deploykit.tasks.question_answering.facts import MAX_CONTEXT_CHARS, QuestionAnswering
from deploykit.tasks.question_answering.predictor import Answerer
from deploykit.tasks.question_answering.spans import Candidates, Collector, candidates
from deploykit.tasks.question_answering.training import check_room, label_windows
from deploykit.tasks.question_answering.windows import EncodedContext, PairTokenizer, Window

QUESTIONS = ("Where is w2 ?", "它在哪？", "w1 or w3?", "Wo steht dort ein Café?")


@pytest.fixture(scope="module")
def answerer_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TorchAnswerer]:
    """Return a random model of a family, made once."""
    made: dict[str, TorchAnswerer] = {}

    def of(family: str) -> TorchAnswerer:
        if family not in made:
            made[family] = TorchAnswerer.load(
                write_checkpoint(tmp_path_factory.mktemp(family) / "model", family, sharp=True)
            )
        return made[family]

    return of


def _contexts(count: int) -> list[str]:
    chosen = random.Random(7)
    parts = [*CONTEXT.split(" "), *WORDS[:20], "  ", "它在", "😀", "e\u0301", "The", "the"]
    return [" ".join(chosen.choices(parts, k=chosen.randint(3, 90))) for _ in range(count)]


def _reference(answerer: TorchAnswerer, question: str, context: str, top_k: int) -> list[dict[str, Any]]:
    """Compute the published rule in plain loops: tokenizer with overflow, softmax by window, sums by text."""
    import torch

    task, hub = answerer.task, answerer.hub_tokenizer
    encoded = hub(
        question, context, truncation="only_second", max_length=task.max_length, stride=task.doc_stride,
        return_overflowing_tokens=True, return_offsets_mapping=True, return_token_type_ids=True,
    )  # fmt: skip
    answers: list[dict[str, Any]] = []
    for window, ids in enumerate(encoded["input_ids"]):
        inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        if task.token_types:
            inputs["token_type_ids"] = torch.tensor([encoded["token_type_ids"][window]])
        with torch.inference_mode():
            output = answerer.model(**inputs)
        members = encoded.sequence_ids(window)
        allowed = np.array([member == 1 or i == 0 for i, member in enumerate(members)])
        start, end = (
            np.where(allowed, logits[0].double().numpy(), -10000.0)
            for logits in (output.start_logits, output.end_logits)
        )
        start, end = (np.exp(x - x.max()) / np.exp(x - x.max()).sum() for x in (start, end))
        scored = [
            (start[s] * end[e], s, e)
            for s in range(1, len(ids)) if members[s] == 1
            for e in range(s, min(s + task.max_answer_length, len(ids))) if members[e] == 1
        ]  # fmt: skip
        encoding = encoded.encodings[window]
        for score, s, e in sorted(scored, key=lambda item: -item[0])[: 2 * top_k + 10 if task.whole_words else top_k]:
            begin, stop = encoding.offsets[s][0], encoding.offsets[e][1]
            if task.whole_words:
                words = encoding.token_to_word(s), encoding.token_to_word(e)
                begin, stop = encoding.word_to_chars(words[0], 1)[0], encoding.word_to_chars(words[1], 1)[1]
            while begin < stop and context[begin].isspace():
                begin += 1
            while begin < stop and context[stop - 1].isspace():
                stop -= 1
            text = context[begin:stop]
            same = next((a for a in answers if a["text"].lower() == text.lower()), None)
            if same is None:
                answers.append({"text": text, "start": begin, "end": stop, "score": score})
            else:
                same["score"] += score
    return sorted(answers, key=lambda a: -a["score"])[:top_k]


@pytest.mark.parametrize("whole_words", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_spans_are_those_of_the_published_rule(
    family: str, whole_words: bool, answerer_of: Callable[[str], TorchAnswerer]
) -> None:
    tiny = answerer_of(family)
    task = dataclasses.replace(tiny.task, whole_words=whole_words)
    answerer = TorchAnswerer(tiny.model, tiny.hub_tokenizer, task)
    pairs = [(question, context) for context in _contexts(3) for question in QUESTIONS[:2]]
    windows = [len(list(answerer.tokenizer.windows(answerer.tokenizer.question(q), answerer.tokenizer.context(c))))
               for q, c in pairs]  # fmt: skip
    assert max(windows) > 2
    for (question, context), found in zip(pairs, answerer.find(pairs, top_k=3)):
        expected = _reference(answerer, question, context, 3)
        ours = [(s.text.rstrip("\u0301"), s.start) for s in found.spans]
        assert ours == [(a["text"].rstrip("\u0301"), a["start"]) for a in expected]
        ratio = found.spans[0].score / found.spans[-1].score
        assert ratio == pytest.approx(expected[0]["score"] / expected[-1]["score"], rel=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_windows_are_those_of_transformers(family: str, answerer_of: Callable[[str], TorchAnswerer]) -> None:
    answerer = answerer_of(family)
    task, own = answerer.task, answerer.tokenizer
    for context in [*_contexts(5), CONTEXT, "w1"]:
        encoded = answerer.hub_tokenizer(
            QUESTIONS[0], context, truncation="only_second", max_length=task.max_length, stride=task.doc_stride,
            return_overflowing_tokens=True, return_token_type_ids=True,
        )  # fmt: skip
        windows = list(own.windows(own.question(QUESTIONS[0]), own.context(context)))
        assert [w.ids for w in windows] == encoded["input_ids"]
        if task.token_types:
            assert [w.types for w in windows] == encoded["token_type_ids"]


def test_a_tokenizer_that_pads_on_the_left_has_the_context_first(answerer_of: Callable[[str], TorchAnswerer]) -> None:
    tiny = answerer_of("bert")
    hub = tiny.hub_tokenizer
    task = dataclasses.replace(tiny.task, question_first=False)
    own = PairTokenizer.load(Path(hub.name_or_path) / "tokenizer.json", task)
    (text,) = _contexts(1)
    context, question = own.context(text * 2), own.question("w1 ?")
    encoded = hub(
        text * 2, "w1 ?", truncation="only_first", max_length=task.max_length, stride=task.doc_stride,
        return_overflowing_tokens=True, return_token_type_ids=True,
    )  # fmt: skip
    windows = list(own.windows(question, context))
    assert len(windows) > 1
    assert [w.ids for w in windows] == encoded["input_ids"]
    assert [w.types for w in windows] == encoded["token_type_ids"]
    for window in windows:
        assert (
            window.ids[window.at : window.at + window.end - window.begin]
            == context.ids[window.begin : window.end].tolist()
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_word_is_found_again_at_its_place(family: str, answerer_of: Callable[[str], TorchAnswerer]) -> None:
    own = answerer_of(family).tokenizer
    for context in [CONTEXT, "  w1   w2 ", "它在北京。w1"]:
        encoded = own.context(context)
        for word in context.split():
            start = context.index(word)
            tokens = encoded.tokens_of(start, start + len(word))
            assert tokens is not None
            assert encoded.place(*tokens, 0, len(encoded.ids), whole_words=False) == (start, start + len(word)), word


def test_byte_level_offsets_after_a_split_at_white_space_keep_the_first_letter() -> None:
    """Such a tokenizer's offsets begin at a word's second letter, because it confuses the first with the space."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "R"), ("ĠR", "o"), ("Ġ", "l"), ("Ġ", "Ã"), ("ĠÃ", "©"), ("Ġ", "i")]
    pieces = ("<s>", "</s>", *alphabet, *("".join(pair) for pair in merges))
    tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)]
    )
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0), trim_offsets=True)
    task = QuestionAnswering(64, 8, 0, token_types=False)
    context = "Rom liegt in Italien 😀 étape"
    assert (5, 5) in tokenizer.encode(context, add_special_tokens=False).offsets, "Ġl has no letter"
    encoded = PairTokenizer(tokenizer, task).context(context)
    for word in context.split():
        start = context.index(word)
        tokens = encoded.tokens_of(start, start + len(word))
        assert tokens is not None
        begin, end = encoded.place(*tokens, 0, len(encoded.ids), whole_words=True)
        assert context[begin:end] == word


def test_a_label_is_the_place_of_the_answer_or_the_first_token(answerer_of: Callable[[str], TorchAnswerer]) -> None:
    from deploykit.tasks.question_answering.rows import Example, RightAnswers

    own = answerer_of("bert").tokenizer
    words = [WORDS[i] for i in range(120)]
    context = " ".join(words)
    example = Example("w199 ?", context, RightAnswers(("w70 w71",), (context.index("w70 w71"),)), "1", "1")
    labelled = label_windows(own, [example])
    ids = own.question("w70 w71")
    whole = [
        i for i, (window, (s, e)) in enumerate(zip(labelled.windows, labelled.labels)) if window.ids[s : e + 1] == ids
    ]
    assert whole
    assert labelled.without == len(labelled.windows) - len(whole)
    assert all(labelled.labels[i] == (0, 0) for i in range(len(labelled.windows)) if i not in whole)
    with pytest.raises(DataError, match="row 9: the question has 200 tokens"):
        check_room(own, [example, dataclasses.replace(example, question=" ".join(WORDS), origin="row 9")], 32)


def _window(context_tokens: int) -> Window:
    """Return a window of [CLS] q [SEP] and the context."""
    return Window([0] * (3 + context_tokens), [0] * (3 + context_tokens), 3, 0, context_tokens)


def test_candidates_keep_to_the_context_to_the_longest_answer_and_to_the_padding() -> None:
    logits = np.full((1, 12), 0.0, np.float32)
    start, end = logits.copy(), logits.copy()
    start[0, [1, 4]], end[0, [1, 5, 7, 9]] = 9, (9, 2, 4, 20)  # 1 is the question, 9 padding
    (found,) = candidates(start, end, [_window(5)], most=3, longest=3, with_none=True)
    assert (found.first[0], found.last[0]) == (4, 5), "from 4 to 7 would be four tokens"
    assert (found.last - found.first).max() < 3
    assert found.first.min() >= 3
    assert found.last.max() <= 7
    (longer,) = candidates(start, end, [_window(5)], most=3, longest=4, with_none=True)
    assert (longer.first[0], longer.last[0]) == (4, 7)
    assert 0 < found.none < longer.probability[0]


def test_a_span_in_two_windows_is_one_answer_and_the_least_none_counts() -> None:
    text = "Rome and rome"
    context = EncodedContext(text, *(np.array(a, np.int32) for a in ([5, 6, 7], [0, 5, 9], [4, 8, 13], [0, 1, 2])))
    task = QuestionAnswering(16, 2, 0, no_answer_threshold=1.0)
    collector = Collector(context, task, 5)
    for begin, first, probability, none in ((0, 0, 0.5, 0.2), (0, 2, 0.1, 0.2), (1, 1, 0.25, 0.6)):
        window = Window([], [], 0, begin, 3)
        one = np.array([first])
        collector.add(window, Candidates(one, one, np.array([probability]), none))
    found = collector.result()
    assert [(s.text, s.start, s.end) for s in found.spans] == [("Rome", 0, 4)], "the case makes no other answer"
    assert found.none == pytest.approx(np.log(0.2 / 0.85))
    assert found.spans[0].score == pytest.approx(0.85 / 1.05)
    assert found.decide(1.0).text == "Rome"
    assert found.decide(-2.0).text == ""
    assert found.decide(None).text == "Rome"


def test_answers_do_not_depend_on_the_batch_and_positions_match(answerer_of: Callable[[str], TorchAnswerer]) -> None:
    answerer = answerer_of("bert")
    pairs = [(question, context) for context in _contexts(4) for question in QUESTIONS[:2]]
    together = answerer.find(pairs, top_k=4)
    assert answerer.find(pairs[::-1], top_k=4)[::-1] == together
    assert [answerer.find([pair], top_k=4)[0] for pair in pairs[:3]] == together[:3]
    for (_, context), found in zip(pairs, together):
        assert len({span.text.lower() for span in found.spans}) == len(found.spans), "no doubles"
        assert all(context[span.start : span.end] == span.text for span in found.spans)
        assert [span.score for span in found.spans] == sorted((span.score for span in found.spans), reverse=True)


def test_a_context_is_tokenized_once_for_all_its_questions(
    answerer_of: Callable[[str], TorchAnswerer], monkeypatch: pytest.MonkeyPatch
) -> None:
    answerer = answerer_of("bert")
    tokenized: list[str] = []
    original = PairTokenizer.context
    monkeypatch.setattr(
        PairTokenizer,
        "context",
        lambda self, text: tokenized.append(text) or original(self, text),  # type: ignore[func-returns-value]
    )
    answerer.find([("w1 ?", "w2 w3"), ("w4 ?", "w5"), ("w6 ?", "w2 w3")])
    assert tokenized == ["w2 w3", "w5"]


def test_refused_questions_name_the_lengths_and_the_others_are_answered(
    answerer_of: Callable[[str], TorchAnswerer],
) -> None:
    answerer = answerer_of("bert")
    long, context = " ".join(WORDS[:80]), " ".join(WORDS)
    pairs = [("w1 ?", "w2"), ("\u200b ", "w2"), ("w1", " \x00\u200b "), (long, "w2"), (" ".join(WORDS[:50]), context),
             ("w1", "x" * (MAX_CONTEXT_CHARS + 1)), ("<b>w1</b>\x00", "<script>w3</script>\x00 &amp;")]  # fmt: skip
    found = answerer.try_all(pairs)
    told = [f.message if isinstance(f, DataError) else "" for f in found]
    assert told[0] == told[6] == ""
    assert told[1] == "the question is empty"
    assert told[2] == "the context is empty"
    assert "80 tokens" in told[3]
    assert "a window of 64" in told[3]
    assert "leave 11 of a window's 64" in told[4], told[4]
    assert "windows share 32" in told[4]
    assert f"more than {MAX_CONTEXT_CHARS:,}" in told[5]
    with pytest.raises(DataError, match="question 1: the question is empty"):
        answerer.find(pairs)


def test_a_long_context_is_read_in_bounded_batches(answerer_of: Callable[[str], TorchAnswerer]) -> None:
    tiny = answerer_of("bert")
    rows: list[int] = []

    def read(inputs: dict[str, Any]) -> tuple[Any, Any]:
        ids = inputs["input_ids"]
        rows.append(ids.size)
        logits = (ids == 4 + 77).astype(np.float32) * 20  # w77
        return logits, logits

    task = dataclasses.replace(tiny.task, max_length=512, doc_stride=8)
    own = PairTokenizer.load(Path(tiny.hub_tokenizer.name_or_path) / "tokenizer.json", task)
    context = "w1 w2 w3 w4 " * 20_000 + "w77 " + "w5 w6 " * 5_000
    (found,) = Answerer(task, own, read, 4096).find([("w1 ?", context)])
    assert found.spans[0].start == context.index("w77")
    assert found.spans[0].text == "w77"
    assert max(rows) <= 4096
    assert sum(rows) > 90_000


def test_a_long_chinese_context_takes_a_few_bytes_a_character(
    answerer_of: Callable[[str], TorchAnswerer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a text has no white space to be cut at. Counted is what Python and numpy allocate, the same in each run."""
    monkeypatch.setattr(windows, "_PIECE", 5_000)
    monkeypatch.setattr(predictor, "_WINDOWS_AT_ONCE", 8)
    tiny = answerer_of("bert")
    task = dataclasses.replace(tiny.task, max_length=512, doc_stride=8)
    own = PairTokenizer.load(Path(tiny.hub_tokenizer.name_or_path) / "tokenizer.json", task)
    (last,) = own.question("北")

    def read(inputs: dict[str, Any]) -> tuple[Any, Any]:
        logits = (inputs["input_ids"] == last).astype(np.float32) * 20
        return logits, logits

    peaks = []
    for length in (20_000, 60_000):
        context = "它在京。" * (length // 4) + "北"
        tracemalloc.start()
        (found,) = Answerer(task, own, read, 4096).find([("它？", context)])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert (found.spans[0].text, found.spans[0].start) == ("北", length)
    assert peaks[1] - peaks[0] < 50 * 40_000


def test_facts_choose_whole_words_and_the_threshold(answerer_of: Callable[[str], TorchAnswerer]) -> None:
    tiny = answerer_of("bert")
    context = tiny.tokenizer.context("unknownword w1")
    first = context.tokens_of(0, 3)
    assert first is not None
    assert context.place(0, 2, 0, len(context.ids), whole_words=True) == (0, 11)
    assert context.place(0, 2, 0, len(context.ids), whole_words=False) == (0, 3)


def test_a_space_before_a_word_makes_no_second_answer() -> None:
    """A window that begins after SentencePiece's token of the space has the word alone; transformers' pipeline takes
    the word with and without its space for two answers."""
    context = EncodedContext("in Rome", *(np.array(a, np.int32) for a in ([5, 6, 7], [0, 2, 3], [2, 3, 7], [0, 1, 1])))
    collector = Collector(context, QuestionAnswering(16, 2, 0), 5)
    for begin in (1, 2):
        last = np.array([2 - begin])
        collector.add(Window([], [], 0, begin, 3), Candidates(last, last, np.array([0.25]), 0.0))
    (span,) = collector.result().spans
    assert (span.text, span.start, span.end, span.score) == ("Rome", 3, 7, 1.0)


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": 1}))
    with pytest.raises(ArtifactError, match="is not a tokenizer"):
        PairTokenizer.load(tmp_path / "tokenizer.json", QuestionAnswering(64, 8, 0))
