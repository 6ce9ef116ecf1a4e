"""The decoder of language models: joining, leaving, known beginnings of prompts, and memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from language_models import random_model, tokenizer

from deploykit.errors import DataError, UsageError
from deploykit.graphs.causal_architecture import read_causal_architecture
from deploykit.graphs.causal_decoder import build_causal_decoder
from deploykit.graphs.native_causal import NativeCausalWriter
from deploykit.quantization.onnx_files import save_with_weights
from deploykit.runtime.engines import load_language_model
from deploykit.runtime.engines.native.causal_lm import NativeCausalLm
from deploykit.runtime.engines.native.loader import lacks
from deploykit.runtime.sampling import Sampling, override
from deploykit.tasks.text_generation.chat_template import CHATML
from deploykit.tasks.text_generation.checkpoint import TorchGenerator, chat_tokenizer, checkpoint_facts
from deploykit.tasks.text_generation.decoder import Decoder, Query
from deploykit.tasks.text_generation.generator import LocalGenerator
from deploykit.tasks.text_generation.prefixes import PREFIX_BLOCK
from deploykit.tasks.text_generation.prompt_lookup import PromptLookup

LONG = Sampling(max_new_tokens=40, ignore_eos=True)
_LAYERS, _HEADS, _SIZE = 2, 2, 16
BYTES = {"onnxruntime": 4, "native": 2}
"""Of a number in the caches."""


@pytest.fixture(scope="module", params=BYTES)
def graph(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in fp32, in a folder named for the engine that runs it."""
    folder = tmp_path_factory.mktemp("graph") / request.param
    folder.mkdir()
    architecture = read_causal_architecture(random_model("llama"))
    if request.param == "native":
        if lacks() is not None:
            pytest.skip(f"the engine native does not run here: {lacks()}")
        NativeCausalWriter(architecture).save(folder / "model", None)
    else:
        save_with_weights(build_causal_decoder(architecture), folder / "model")
    return folder / "model"


def generator(graph: Path, **limits: int) -> LocalGenerator:
    model, own = random_model("llama"), tokenizer(CHATML)
    facts = checkpoint_facts(model.config, model.generation_config, own)
    tokens = chat_tokenizer(own, facts.eos_token_ids)
    return LocalGenerator(
        facts, tokens, load_language_model(graph.parent.name, graph, 1, context=facts.max_length, **limits)
    )


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


@pytest.mark.parametrize(
    ("family", "settings"), [("llama", {"head_dim": 12}), ("gpt2", {"n_embd": 60}), ("gpt_neox", {"hidden_size": 80})]
)
def test_heads_whose_size_is_no_multiple_of_8_attend_as_in_transformers(
    tmp_path: Path, family: str, settings: dict[str, int]
) -> None:
    model = random_model(family, **settings)
    save_with_weights(build_causal_decoder(read_causal_architecture(model)), tmp_path / "model")
    ours = load_language_model("onnxruntime", tmp_path / "model", 1, context=256)
    tokens = prompt(40)
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0].numpy()
    ours.begin()
    found = [ours.feed(part, range(len(part))).copy() for part in (tokens[:30], tokens[30:])]
    np.testing.assert_allclose(np.concatenate(found), expected, atol=1e-4 * np.abs(expected).max())


def test_prompts_are_read_in_one_pass_with_the_tokens_of_rows(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = generator(graph, max_rows=3)
    if not isinstance(ours.model, NativeCausalLm):
        pytest.skip("this engine reads prompts by themselves")
    monkeypatch.setattr(PromptLookup, "guess", lambda lookup, most: [])
    passes: list[int] = []
    compute = ours.model._compute
    monkeypatch.setattr(
        ours.model, "_compute", lambda tokens, *rest: (passes.append(len(tokens)), compute(tokens, *rest))
    )
    first, long, *short = (
        Query(prompt(10), LONG),
        Query(prompt(150), LONG),
        *(Query(prompt(9, n), LONG) for n in range(2)),
    )
    for query in (first, long, *short):
        ours.decoder.add(query)
    for _ in range(4):
        ours.decoder.step()
    # All that fits the rows; then 128 tokens of prompts beside each step.
    assert passes == [10 + 150 + 9, 3, 3, 3]
    long.cancelled = first.cancelled = True
    for query in (Query(prompt(210, 1), LONG), Query(prompt(210, 2), LONG)):
        ours.decoder.add(query)
    passes.clear()
    for _ in range(6):
        ours.decoder.step()
    assert passes == [1 + 9 + 96, 2 + 114, 3, 3, 3, 3]


@pytest.mark.parametrize("beginning", [0, 2 * PREFIX_BLOCK])
def test_prompts_read_together_share_what_they_begin_with(graph: Path, beginning: int) -> None:
    ours = generator(graph, max_rows=4)
    queries = [Query([*prompt(beginning), *prompt(40, seed)], LONG) for seed in range(1, 4)]
    for query in queries:
        ours.decoder.add(query)
    ours.decoder.step()
    assert len(ours.decoder.running) == (1 if beginning and isinstance(ours.model, NativeCausalLm) else 3)
    run(ours.decoder, [])
    for query in queries:
        alone = Query(query.prompt, query.sampling)
        run(generator(graph, max_rows=4).decoder, [alone])
        assert ids(alone) == ids(query)


def test_a_cancelled_query_leaves_at_the_next_step(graph: Path) -> None:
    ours = generator(graph, max_rows=3)
    gone, other, waiting, unread = (Query(prompt(20, seed), LONG) for seed in range(4))
    many = Query(prompt(300), LONG)
    for joining in ((gone, other), (many, waiting, unread)):
        for query in joining:
            ours.decoder.add(query)
        for _ in range(2):  # while rows run, not all of the long prompt is read
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


def test_queries_that_are_all_cancelled_leave_in_one_step(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploykit.tasks.text_generation.decoder._PROMPT_TOKENS", 64)  # less than the prompts have
    ours = generator(graph, max_rows=3)
    queries = [Query(prompt(length, length), LONG) for length in (20, 250, 249)]
    for query in queries:
        ours.decoder.add(query)
    while len(ours.decoder.running) < 2:
        ours.decoder.step()
    queries += [Query(prompt(200, seed), LONG) for seed in range(6)]
    for query in queries[3:]:
        ours.decoder.add(query)
    for query in queries:
        query.cancelled = True
    assert ours.decoder.step() == []
    assert ours.decoder.idle
    assert ours.decoder.claimed == 0


class _Complex:
    """A constraint that can no longer be followed after some tokens."""

    done = False

    def __init__(self, tokens: int) -> None:
        self.left = tokens

    def mask(self, logits: np.ndarray) -> np.ndarray:
        if not self.left:
            raise UsageError("json_schema cannot be followed: too complex", "make it simpler")
        return logits

    def advance(self, token_id: int) -> None:
        self.left -= 1


@pytest.mark.parametrize("tokens", [(9, 3, 9), (9, 9, 0), (0, 9, 9)])
def test_a_constraint_that_becomes_too_complex_ends_its_own_query_at_once(graph: Path, tokens: tuple[int, ...]) -> None:
    ours = generator(graph, max_rows=5)
    beside = [Query(prompt(20, seed), LONG) for seed in range(2)]
    constraints: list[Any] = [_Complex(each) for each in tokens]
    failing = Query(prompt(20, 9), Sampling(max_new_tokens=40, ignore_eos=True, n=3), constraints)
    for query in (beside[0], failing, beside[1]):
        ours.decoder.add(query)
    done: list[Query] = []
    while failing not in done:
        done += ours.decoder.step()
    assert str(failing.error).startswith("json_schema cannot be followed")
    assert max(len(answer.ids) for answer in failing.answers) <= min(tokens) + 1, "the others go no further"
    assert all(answer.query is not failing for answer in ours.decoder.running)
    while not ours.decoder.idle:
        done += ours.decoder.step()
    assert done.count(failing) == 1
    assert ours.model.rows == 0
    for query in beside:
        alone = Query(query.prompt, LONG)
        run(generator(graph).decoder, [alone])
        assert ids(query) == ids(alone)


def test_a_known_beginning_is_not_read_again_and_changes_no_bit(graph: Path) -> None:
    ours = generator(graph)
    read: list[int] = []
    if isinstance(ours.model, NativeCausalLm):
        mix = ours.model.mix
        ours.model.mix = lambda tokens, parts=(): (read.extend(len(part.ids) for part in parts), mix(tokens, parts))[1]
    else:
        feed = ours.model.feed
        ours.model.feed = lambda part, wanted: (read.append(len(part)), feed(part, wanted))[1]  # type: ignore[method-assign]
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


def test_guessed_tokens_save_steps_and_change_no_bit(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if graph.parent.name != "native":
        pytest.skip("this engine takes no guesses")
    text = prompt(40)
    samplings = [Sampling(max_new_tokens=60, ignore_eos=True, logprobs=2),
                 Sampling(max_new_tokens=60, temperature=0.7, seed=3, n=2, repetition_penalty=1.1, logprobs=0)]  # fmt: skip
    known: list[list[int]] = []

    def guess(lookup: PromptLookup, most: int) -> list[int]:
        """Guess all tokens right but the last one."""
        seen = lookup._tokens
        right = next((ids[len(seen) :] for ids in known if ids[: len(seen)] == seen), [])[: most - 1]
        return [*right, (right[-1] + 1) % 400] if right else []

    monkeypatch.setattr(PromptLookup, "guess", guess)
    steps, found = [], []
    for _ in range(2):
        ours = generator(graph, max_rows=4)
        queries = [Query(text, sampling) for sampling in samplings]
        steps.append(0)
        for query in queries:
            ours.decoder.add(query)
            while not query.done:
                ours.decoder.step()
                steps[-1] += 1
        answers = [answer for query in queries for answer in query.answers]
        found.append([(answer.ids, answer.text, answer.logprobs) for answer in answers])
        known = [[*text, *answer.ids] for answer in answers]
    assert found[0] == found[1]
    assert steps[1] < 0.5 * steps[0]


def test_guessing_rests_where_guesses_are_wrong() -> None:
    lookup = PromptLookup([1, 2, 3, 4, 5, 9, 1, 2, 3])
    assert lookup.guess(2) == [4, 5]
    assert lookup.guess(20) == [4, 5, 9, 1, 2, 3]
    assert PromptLookup([1, 2, 3, *range(20), 1, 2, 3]).guess(20) == list(range(4, 12))
    lookup.add([7])
    assert lookup.guess(5) == []
    lookup.add([1, 2, 3])
    assert lookup.guess(1) == [7], "the latest place counts"
    assert PromptLookup([5, 1, 2, 7, 8, 9, 1, 2]).guess(2) == [7, 8], "two tokens have occurred, three have not"
    for _ in range(20):
        lookup.learn(5, 0)
    assert [bool(lookup.guess(1)) for _ in range(40)].index(True) == 32


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
    token_bytes = 2 * _LAYERS * _HEADS * _SIZE * BYTES[graph.parent.name]
    ours = generator(graph, max_rows=16, max_cache_bytes=400 * token_bytes)
    assert (ours.model.max_tokens, ours.model.prefix_tokens) == (300, 100)
    queries = [Query(prompt(60 + seed, seed), LONG) for seed in range(12)]
    for query in queries:
        ours.decoder.add(query)
    most = 0
    while not ours.decoder.idle:
        ours.decoder.step()
        most = max(most, len(ours.decoder.running))
        assert int(ours.model._touched.sum()) <= 300  # type: ignore[attr-defined]
    assert most == 2, "three quarters of the tokens are for rows, a quarter for beginnings of prompts"
    for query in queries:
        alone = Query(query.prompt, LONG)
        run(generator(graph).decoder, [alone])
        assert ids(query) == ids(alone)
    with pytest.raises(DataError, match=r"may take 340 tokens, and the model's caches hold 300"):
        ours.check(prompt(100), Sampling(max_new_tokens=70, n=2))
    with pytest.raises(DataError, match="n is 17, and the model decodes 16 answers at once"):
        ours.check(prompt(3), Sampling(max_new_tokens=1, n=17))


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"num_beams": 4, "length_penalty": 0.3, "n": 3},
        {"num_beams": 3, "early_stopping": True, "length_penalty": 2.0},
        {"num_beams": 3, "early_stopping": "never", "min_new_tokens": 6},
    ],
)
@pytest.mark.parametrize("torch_too", [False, True])
def test_beam_search_gives_the_tokens_of_generate(graph: Path, options: dict[str, Any], torch_too: bool) -> None:
    import torch

    ours = generator(graph)
    model = random_model("llama")
    # Some frequent tokens end an answer, so that hypotheses of different lengths compete.
    ends = (2, *range(6, 390, 8))
    facts = dataclasses.replace(ours.task, eos_token_ids=ends)
    if torch_too:
        ours = TorchGenerator(model, tokenizer(CHATML), facts)
    else:
        ours = LocalGenerator(facts, ours.tokenizer, ours.model)
    prompts = [prompt(length, 9) for length in (3, 20, 33, 50, 7)]
    sampling = override(Sampling(max_new_tokens=14), options)
    lengths = set()
    for text, found in zip(prompts, ours.generate(prompts, sampling)):
        expected = model.generate(
            torch.tensor([text]), attention_mask=torch.ones(1, len(text), dtype=torch.long), do_sample=False,
            eos_token_id=list(ends), pad_token_id=5, max_new_tokens=14, num_return_sequences=sampling.n,
            **{name: value for name, value in options.items() if name != "n"},
        )  # fmt: skip
        for answer, row in zip(found, expected.tolist()):
            generated = row[len(text) :]
            while generated[-1] == 5:
                generated.pop()
            assert list(answer.ids) == generated
            assert answer.finish == ("eos" if generated[-1] in ends else "length")
            lengths.add(len(generated))
    assert ours.decoder.idle
    assert ours.model.rows == 0
    assert len(lengths) > 1 or options.get("early_stopping") == "never"


def test_beams_beside_other_answers_change_nothing(graph: Path) -> None:
    ours = generator(graph, max_rows=9)
    beams = Sampling(max_new_tokens=10, num_beams=4)
    queries = [ours.query(prompt(20 + i, i), beams if i % 2 else LONG) for i in range(8)]
    run(ours.decoder, queries)
    for query in queries:
        alone = ours.query(query.prompt, query.sampling)
        run(ours.decoder, [alone])
        assert ids(alone) == ids(query)
    with pytest.raises(UsageError, match="num_beams cannot be combined with temperature"):
        override(beams, {"temperature": 1.0})
    with pytest.raises(UsageError, match="n is 5, and num_beams is 4"):
        override(beams, {"n": 5})


def test_a_failure_leaves_the_generator_usable(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = generator(graph)
    expected = ours.generate([prompt(10)], LONG)
    with monkeypatch.context() as patch:
        patch.setattr(ours.model, "step", lambda tokens: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ours.generate([prompt(10), prompt(11)], LONG)
    assert ours.generate([prompt(10)], LONG) == expected


def test_a_token_without_an_embedding_is_refused_in_its_prompt_alone(graph: Path) -> None:
    ours = generator(graph)
    vocabulary = ours.task.vocabulary
    ours.tokenizer.tokenizer.add_tokens([f"<{i}>" for i in range(vocabulary)])
    good, bad = ours.reply(["a", f"a<{vocabulary - 1}>"], LONG)
    assert [good] == ours.reply(["a"], LONG)
    assert isinstance(bad, DataError)
    assert f"and the model has {vocabulary} tokens" in bad.message


def test_failures_while_prompts_are_read_together_lose_no_rows(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = generator(graph, max_rows=4)
    if not isinstance(ours.model, NativeCausalLm):
        pytest.skip("this engine reads prompts by themselves")
    prompts = [prompt(10, seed) for seed in range(4)]
    expected = ours.generate(prompts, LONG)
    for _ in range(3):
        with monkeypatch.context() as patch:
            patch.setattr(ours.model, "_compute", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                ours.generate(prompts, LONG)
    assert ours.generate(prompts, LONG) == expected
    assert len(ours.model._free) == 4


def test_ten_thousand_requests_leave_nothing_behind(graph: Path) -> None:
    import threading

    import psutil

    from deploykit.runtime.decode_loop import DecodeLoop

    class Client:
        """Half of the clients go before their answer."""

        def __init__(self, number: int) -> None:
            self.gone, self.done = number % 2 == 1, 0

        def is_cancelled(self) -> bool:
            return self.gone

        def answer(self) -> None:
            self.done += 1
            finished.release()

        def fail(self, error: Exception | None) -> None:
            self.done += 1
            finished.release()

    finished = threading.Semaphore(0)
    loop = DecodeLoop(lambda: generator(graph, max_rows=32), max_queue=20_000, checks=64)
    process, memory = psutil.Process(), []
    try:
        for _ in range(4):
            clients = [Client(i) for i in range(2_500)]
            for i, client in enumerate(clients):
                sampling = Sampling(max_new_tokens=1 + i % 3, n=1 + i % 2, stop=("x",) if i % 5 else ())
                loop.submit(client, [loop.model.query(prompt(1 + i % 40, i), sampling)])
            for _client in clients:
                assert finished.acquire(timeout=120)
            assert {client.done for client in clients} == {1}
            memory.append(process.memory_info().rss)
    finally:
        loop.close()
    assert [len(found) for found in (loop._requests, loop._queue, loop._request_by_unit, loop._inbox)] == [0] * 4
    assert loop._waiting == 0
    assert loop.model.decoder.idle
    assert loop.model.decoder.claimed == loop.model.model.rows == 0
    assert memory[-1] - memory[1] < 30 << 20


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
