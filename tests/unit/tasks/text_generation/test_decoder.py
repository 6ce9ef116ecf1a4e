"""The decoder of language models: joining, leaving, known beginnings of prompts, and memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from language_models import random_model, tokenizer

from deploykit.errors import DataError
from deploykit.graphs.causal_architecture import read_causal_architecture
from deploykit.graphs.causal_decoder import build_causal_decoder
from deploykit.graphs.writer import save_with_weights
from deploykit.runtime.engines.causal_lm import OnnxCausalLm
from deploykit.runtime.sampling import Sampling
from deploykit.tasks.text_generation.chat_template import CHATML
from deploykit.tasks.text_generation.checkpoint import TorchGenerator, chat_tokenizer, checkpoint_facts
from deploykit.tasks.text_generation.decoder import PREFIX_BLOCK, Decoder, Query
from deploykit.tasks.text_generation.generator import LocalGenerator

LONG = Sampling(max_new_tokens=40, ignore_eos=True)
_LAYERS, _HEADS, _SIZE = 2, 2, 16
TOKEN_BYTES = 2 * _LAYERS * _HEADS * _SIZE * 4


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("graph") / "decoder.onnx"
    save_with_weights(build_causal_decoder(read_causal_architecture(random_model("llama"))), path)
    return path


def generator(graph: Path, **limits: int) -> LocalGenerator:
    model, own = random_model("llama"), tokenizer(CHATML)
    facts = checkpoint_facts(model.config, model.generation_config, own)
    tokens = chat_tokenizer(own, facts.eos_token_ids)
    return LocalGenerator(facts, tokens, OnnxCausalLm(graph, 1, context=facts.max_length, **limits))


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng((length, seed)).integers(6, 390, length).tolist()


def run(decoder: Decoder, queries: list[Query]) -> None:
    for query in queries:
        decoder.add(query)
    while not decoder.idle:
        decoder.step()


def ids(query: Query) -> list[list[int]]:
    return [answer.ids for answer in query.answers]


def test_requests_that_join_and_leave_at_any_step_get_the_answers_they_get_alone(graph: Path) -> None:
    ours = generator(graph, max_rows=4)
    random = np.random.default_rng(0)
    queries = [
        Query(prompt(int(random.integers(1, 100)), seed), Sampling(
            max_new_tokens=int(random.integers(1, 30)), temperature=float(seed % 3), seed=seed, n=1 + seed % 2,
            repetition_penalty=1.0 + 0.1 * (seed % 2), ignore_eos=True, logprobs=2))
        for seed in range(24)
    ]  # fmt: skip
    waiting, done = list(queries), []
    while waiting or not ours.decoder.idle:
        for _ in range(int(random.integers(0, 3))):
            if waiting:
                ours.decoder.add(waiting.pop(0))
        done += ours.decoder.step()
        assert len(ours.decoder.running) == ours.model.rows <= 4
    assert set(done) == set(queries)
    assert ours.decoder.tokens == sum(len(a.ids) for query in queries for a in query.answers)
    for query in queries:
        alone = Query(query.prompt, query.sampling)
        run(generator(graph, max_rows=4).decoder, [alone])
        assert ids(alone) == ids(query)
        assert [a.logprobs for a in alone.answers] == [a.logprobs for a in query.answers], "to the last bit"


def test_a_cancelled_query_leaves_at_the_next_step(graph: Path) -> None:
    ours = generator(graph, max_rows=3)
    gone, other, waiting, unread = (Query(prompt(20, seed), LONG) for seed in range(4))
    many = Query(prompt(200), LONG)
    for joining in ((gone, other), (many, waiting, unread)):
        for query in joining:
            ours.decoder.add(query)
        for _ in range(2):  # while rows run, less than half of the long prompt is read
            ours.decoder.step()
    assert len(ours.decoder.running) == 2
    many.cancelled = gone.cancelled = unread.cancelled = True  # one of them while its prompt is read
    ours.decoder.step()
    assert gone not in [answer.query for answer in ours.decoder.running]
    while not ours.decoder.idle:
        ours.decoder.step()
    assert not many.answers
    assert not unread.answers
    for query in (other, waiting):
        alone = Query(query.prompt, LONG)
        run(generator(graph).decoder, [alone])
        assert ids(query) == ids(alone)
    assert ours.decoder.claimed == ours.model.rows == 0


def test_a_known_beginning_is_not_read_again_and_changes_no_bit(graph: Path) -> None:
    ours = generator(graph)
    read: list[int] = []
    feed = ours.model.feed

    def counted(part: list[int], wanted: list[int]) -> object:
        read.append(len(part))
        return feed(part, wanted)

    ours.model.feed = counted  # type: ignore[method-assign, assignment]
    beginning = prompt(3 * PREFIX_BLOCK + 5)
    for rest in ([], [7], [7, 8, 9], prompt(40, 1)):
        whole = [*beginning, *rest]
        sampling = Sampling(max_new_tokens=5, logprobs=0, ignore_eos=True)
        fresh = Query(whole, sampling)
        run(generator(graph).decoder, [fresh])
        read.clear()
        query = Query(whole, sampling)
        run(ours.decoder, [query])
        assert query.answers[0].logprobs == fresh.answers[0].logprobs
        if rest:
            assert sum(read) == len(whole) - 3 * PREFIX_BLOCK
            assert min(read) >= 2, "a prompt is never read one token at a time"
    # A prompt that ends with a block leaves it to be read: its last logits are needed.
    again = beginning[: 2 * PREFIX_BLOCK]
    read.clear()
    run(ours.decoder, [Query(again, LONG)])
    assert sum(read) == PREFIX_BLOCK


def test_log_probabilities_of_the_prompt_are_those_of_scoring(graph: Path) -> None:
    from deploykit.tasks.text_generation.encode import EncodedRow

    ours = generator(graph)
    text = prompt(150)
    query = Query(text, Sampling(max_new_tokens=1, logprobs=1), prompt_logprobs=True)
    run(ours.decoder, [query])
    row = EncodedRow(np.array(text), np.arange(len(text)) > 0)
    [score] = ours.score([row])
    np.testing.assert_allclose([found.logprob for found in query.of_prompt], score.logprobs, atol=1e-5)
    assert [found.token for found in query.of_prompt] == text[1:]
    assert [found.top[0][0] == found.token for found in query.of_prompt] == score.best.tolist()


def test_caches_stay_within_their_limit_and_memory_is_given_back(graph: Path) -> None:
    ours = generator(graph, max_rows=16, max_cache_bytes=400 * TOKEN_BYTES)
    assert isinstance(ours.model, OnnxCausalLm)
    assert ours.model.max_tokens == 400
    queries = [Query(prompt(60 + seed, seed), LONG) for seed in range(12)]
    for query in queries:
        ours.decoder.add(query)
    most = 0
    while not ours.decoder.idle:
        ours.decoder.step()
        most = max(most, len(ours.decoder.running))
        assert int(ours.model._touched.sum()) <= 400
    assert most == 3, "three quarters of the tokens are for rows, a quarter for beginnings of prompts"
    for query in queries:
        alone = Query(query.prompt, LONG)
        run(generator(graph).decoder, [alone])
        assert ids(query) == ids(alone)
    with pytest.raises(DataError, match=r"may take 340 tokens, and the model's caches hold 304"):
        ours.check(prompt(100), Sampling(max_new_tokens=70, n=2))
    with pytest.raises(DataError, match="n is 17, and the model decodes 16 answers at once"):
        ours.check(prompt(3), Sampling(max_new_tokens=1, n=17))


def test_a_failure_leaves_the_generator_usable(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = generator(graph)
    expected = ours.generate([prompt(10)], LONG)
    with monkeypatch.context() as patch:
        patch.setattr(ours.model, "step", lambda tokens: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ours.generate([prompt(10), prompt(11)], LONG)
    assert ours.generate([prompt(10)], LONG) == expected


def test_a_stream_is_the_answer_in_pieces(graph: Path) -> None:
    ours = generator(graph)
    messages = [{"role": "user", "content": "list the files"}]
    [[whole]] = ours.reply([messages], LONG)  # type: ignore[misc]
    pieces = list(ours.stream(messages, LONG))
    assert "".join(pieces) == whole.text
    assert len(pieces) > 1
    stream = ours.stream(messages, LONG)
    next(stream)
    stream.close()
    assert ours.decoder.idle


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_checkpoint_answers_on_the_device_that_it_trains_on(graph: Path, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    model, own = random_model("llama"), tokenizer(CHATML)
    facts = checkpoint_facts(model.config, model.generation_config, own)
    sampling = Sampling(max_new_tokens=8, ignore_eos=True)
    prompts = [prompt(5), prompt(30)]
    found = TorchGenerator(model.to(device), own, facts).generate(prompts, sampling)
    assert [a.ids for (a,) in found] == [a.ids for (a,) in generator(graph).generate(prompts, sampling)]
