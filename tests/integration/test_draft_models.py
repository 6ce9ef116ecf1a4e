"""Draft models: the same answers in fewer steps, packaged with their targets."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from language_models import write_export

from deploykit.artifacts import load_manifest
from deploykit.errors import UsageError
from deploykit.runtime.engines import NATIVE_FILE
from deploykit.runtime.engines.native.loader import lacks
from deploykit.runtime.sampling import Sampling
from deploykit.runtime.token_distribution import distribution
from deploykit.tasks.opening import open_generator, open_predictor
from deploykit.tasks.protocol import Predictor
from deploykit.tasks.text_generation.chat_template import CHATML
from deploykit.tasks.text_generation.decoder import Query
from deploykit.tasks.text_generation.draft import Record
from deploykit.tasks.text_generation.generator import LocalGenerator
from deploykit.tasks.text_generation.predictor import DRAFT_FILE, load_generator
from deploykit.triton.repository import package

pytestmark = pytest.mark.skipif(lacks() is not None, reason=f"the engine native does not run here: {lacks()}")

SAMPLINGS = [
    Sampling(max_new_tokens=40, ignore_eos=True, logprobs=1),
    Sampling(max_new_tokens=40, ignore_eos=True, temperature=0.8, top_p=0.9, seed=3, n=2, repetition_penalty=1.2),
    Sampling(max_new_tokens=40, temperature=1.0, top_k=20, seed=4, presence_penalty=0.5, frequency_penalty=0.1),
    Sampling(max_new_tokens=30, temperature=0.5, seed=5, json_schema=True),
    Sampling(max_new_tokens=12, num_beams=2),
]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``target``; ``twin``, which is the same; ``near``, with like weights; and ``other``, with one layer."""
    folder = tmp_path_factory.mktemp("exports")
    write_export(folder / "target", template=CHATML, native=True)
    write_export(folder / "twin", template=CHATML, native=True)
    write_export(folder / "near", template=CHATML, native=True, scale=3.5)
    write_export(folder / "other", template=CHATML, native=True, num_hidden_layers=1, scale=3.0)
    return folder


def opened(folder: Path, draft: str | None, **limits: int) -> LocalGenerator:
    target: Any = load_manifest(folder / "target").task
    weights = None if draft is None else folder / draft / NATIVE_FILE
    return load_generator(folder / "target", target, "native", NATIVE_FILE, 1, draft=weights, **limits)


def open_drafted(target: Path, draft: Path, *, engine: str) -> Predictor:
    return open_predictor(str(target), url="", engine=engine, threads=1, draft_model=str(draft))


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng((length, seed)).integers(6, 390, length).tolist()


def answers(generator: LocalGenerator, queries: list[Query]) -> tuple[list[Any], int]:
    """Return all answers, and the number of steps."""
    for query in queries:
        generator.decoder.add(query)
    steps = 0
    while not generator.decoder.idle:
        generator.decoder.step()
        steps += 1
    return [(a.ids, a.text, a.logprobs, a.finish) for query in queries for a in query.kept()], steps


def asked(generator: LocalGenerator) -> list[Query]:
    return [generator.query(prompt(40 + 7 * i, i), sampling) for i, sampling in enumerate(SAMPLINGS)]


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guess three tokens whatever it costs."""
    monkeypatch.setattr(Record, "tokens", lambda record, most, cost: min(most, 3))


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("draft", ["twin", "other"])
def test_answers_are_those_without_a_draft_alone_and_in_company(exports: Path, draft: str) -> None:
    plain, ours = opened(exports, None), opened(exports, draft)
    expected, _ = answers(plain, asked(plain))
    company, _ = answers(ours, asked(ours))
    assert company == expected
    alone, steps = zip(*(answers(ours, [query]) for query in asked(ours)))
    assert [answer for each in alone for answer in each] == expected
    if draft == "twin":  # it guesses all of them right, of sampled and constrained answers too
        assert [steps[i] < 0.5 * len(expected[j][0]) for i, j in ((0, 0), (1, 1), (2, 3))] == [True] * 3
    assert ours.draft is not None
    assert ours.draft.rows == 0


@pytest.mark.usefixtures("always")
def test_sampled_tokens_have_the_targets_probabilities(exports: Path) -> None:
    ours, text = opened(exports, "near"), prompt(20)
    rules = {"temperature": 3.0, "top_k": 2, "top_p": 0.95}
    expected: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(6):
        for path, probability in list(expected.items()):
            del expected[path]
            ours.model.begin()
            ids = [*text, *path]
            tokens, shares = distribution(ours.model.feed(ids, [len(ids) - 1])[0], **rules)  # type: ignore[arg-type]
            for token, share in zip(tokens.tolist(), (shares / shares.sum()).tolist()):
                expected[(*path, token)] = probability * share
    count = 1000
    samplings = [Sampling(max_new_tokens=6, ignore_eos=True, seed=seed, **rules) for seed in range(count)]  # type: ignore[arg-type]
    guesses, right = [], []
    learn = Record.learn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Record, "learn", lambda r, n, ok: (guesses.append(n), right.append(ok), learn(r, n, ok)))
        queries = [ours.query(text, sampling) for sampling in samplings]
        for first in range(0, count, 3):
            answers(ours, queries[first : first + 3])
    assert 0.1 * sum(guesses) < sum(right) < 0.9 * sum(guesses), "some were right, some were not"
    found = Counter(tuple(query.answers[0].ids) for query in queries)
    assert set(found) <= set(expected)
    assert min(expected.values()) * count > 5
    cells = [(found[path], probability * count) for path, probability in expected.items()]
    chi_square = sum((seen - mean) ** 2 / mean for seen, mean in cells)
    freedom = len(cells) - 1
    assert freedom > 20
    assert chi_square < freedom + 3 * (2 * freedom) ** 0.5


@pytest.mark.usefixtures("always")
def test_both_models_share_the_limit_of_the_caches(exports: Path) -> None:
    expected, _ = answers(opened(exports, None), asked(opened(exports, None)))
    small = opened(exports, "twin", max_cache_bytes=1 << 20)
    alone = opened(exports, None, max_cache_bytes=1 << 20)
    assert small.draft is not None
    assert small.model.max_tokens == small.draft.max_tokens == alone.model.max_tokens // 2
    assert answers(small, asked(small))[0] == expected


@pytest.mark.usefixtures("always")
def test_a_cancelled_answer_leaves_the_draft(exports: Path) -> None:
    ours = opened(exports, "twin")
    gone, other = (ours.query(prompt(600, seed)[:200], SAMPLINGS[0]) for seed in range(2))
    for query in (gone, other):
        ours.decoder.add(query)
    for _ in range(2):
        ours.decoder.step()
    gone.cancelled = True
    expected, _ = answers(opened(exports, None), [ours.query(other.prompt, SAMPLINGS[0])])
    assert answers(ours, [])[0] == []
    assert other.answers[0].ids == expected[0][0]
    assert ours.draft is not None
    assert ours.draft.rows == 0


@pytest.mark.usefixtures("always")
def test_the_draft_is_packaged_with_its_target(exports: Path, tmp_path: Path) -> None:
    made = package(exports / "target", "lm", tmp_path, engine="native", draft_model=exports / "other")
    assert made.manifest.options["draft_model"] == load_manifest(exports / "other").digest
    twin = load_manifest(exports / "other").files[NATIVE_FILE]
    assert made.manifest.files[DRAFT_FILE] == twin
    assert package(exports / "target", "lm", tmp_path, engine="native", draft_model=exports / "other").reused
    assert not package(exports / "target", "lm", tmp_path, engine="native").reused
    packaged = open_generator(str(made.path), url="", threads=1)
    assert isinstance(packaged, LocalGenerator)
    assert packaged.draft is not None
    given = open_drafted(exports / "target", exports / "twin", engine="native")
    assert isinstance(given, LocalGenerator)
    assert packaged.reply(["list"], SAMPLINGS[0]) == given.reply(["list"], SAMPLINGS[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 402}, "it has 402 tokens, not 400"),
        ({"eos_token_id": 7}, "its answers end with 2, 4, 7, not 2, 4"),
    ],
)
def test_a_draft_with_other_tokens_is_refused(
    exports: Path, tmp_path: Path, change: dict[str, int], message: str
) -> None:
    write_export(tmp_path / "draft", template=CHATML, native=True, **change)
    with pytest.raises(UsageError, match=f"cannot guess for .*: {message}"):
        open_drafted(exports / "target", tmp_path / "draft", engine="native")
    with pytest.raises(UsageError, match=message):
        package(exports / "target", "lm", tmp_path, engine="native", draft_model=tmp_path / "draft")


def test_a_draft_with_another_tokenizer_is_refused(exports: Path, tmp_path: Path) -> None:
    from deploykit.artifacts import write_manifest

    draft = write_export(tmp_path / "draft", native=True)
    file = draft / "tokenizer.json"
    file.write_text(file.read_text("utf-8").replace("<|im_start|>", "<|turn|>"), "utf-8")
    write_manifest(draft, "export", load_manifest(exports / "target").task, inputs="")
    with pytest.raises(UsageError, match=r"token 3 is '<\|im_start\|>', and there '<\|im_start\|>' is no token"):
        open_drafted(exports / "target", draft, engine="native")


def test_a_draft_is_refused_where_it_cannot_guess(exports: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"for the engine native, and .*target would run on onnxruntime"):
        open_drafted(exports / "target", exports / "twin", engine="onnxruntime")
    with pytest.raises(UsageError, match="guesses for an export, and served is none"):
        open_drafted(Path("served"), exports / "twin", engine="native")
