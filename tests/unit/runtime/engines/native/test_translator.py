"""The engine ``native`` compared with ONNX Runtime on the same weights, and its errors for broken files."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from translators import FAMILIES, LONGEST, SEARCHES, Case, case, decode, generation_of, open_engine, results

from deploykit.errors import CorruptArtifactError, EngineError
from deploykit.graphs.families import read_architecture
from deploykit.graphs.native_writer import save_native
from deploykit.graphs.seq2seq import build_decoder, build_encoder, save_graphs
from deploykit.runtime.decoding import Decoder, Sentence
from deploykit.runtime.engines import NATIVE_FILE, TRANSLATION_FILES
from deploykit.runtime.engines.native.loader import VARIABLE, instruction_sets, lacks
from deploykit.runtime.engines.native.translator import NativeModel
from deploykit.runtime.engines.native.weights import int8_layers
from deploykit.runtime.engines.protocol import TokenSelection
from deploykit.runtime.engines.seq2seq import Seq2SeqModel
from deploykit.runtime.generation import Generation
from deploykit.runtime.token_selection import select

pytestmark = pytest.mark.skipif(lacks() is not None, reason=f"the engine native does not run here: {lacks()}")
__all__ = ["case"]

Floats = np.ndarray[Any, np.dtype[np.float32]]


def logits_of(model: Any, sources: Sequence[Sequence[int]]) -> Floats:
    """Return logits [steps, sources, vocabulary] of the same tokens for each of 8 sources."""
    model.admit(model.encode(sources), [len(source) for source in sources], [1] * len(sources))
    found = np.stack([model.step(np.full(8, token)).copy() for token in (5, 6, 7, 8)])
    model.remove(np.arange(8))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_without_ranges_only_embedding_and_caches_are_rounded(family: str, tmp_path: Path) -> None:
    """The rest is float32. T5 has its initial weights: the larger ones of other tests amplify a rounded key too much
    for a comparison."""
    torch.manual_seed(0)
    model = FAMILIES[family](**({"initializer_factor": 1.0} if "t5" in family else {})).eval()
    architecture = read_architecture(model)
    save_graphs(tmp_path, build_encoder(architecture), build_decoder(architecture), TRANSLATION_FILES["fp32"])
    save_native(tmp_path / NATIVE_FILE, architecture, {})
    assert int8_layers(tmp_path / NATIVE_FILE) == 0
    random = np.random.default_rng(1)
    sources = [random.integers(3, 118, n).tolist() for n in (1, 3, 4, 5, 9, 17, 30, 31)]
    expected = logits_of(Seq2SeqModel(tmp_path, TRANSLATION_FILES["fp32"], 1), sources)
    found = logits_of(NativeModel(tmp_path, [NATIVE_FILE], 1), sources)
    assert np.abs(found - expected).mean() / expected.std() < 0.02


@pytest.mark.parametrize("family", FAMILIES)
def test_int8_is_as_close_to_fp32_as_onnx_runtimes(case: Callable[[str], Case], family: str) -> None:
    c = case(family)
    sources = c.sources[:8]
    fp32 = logits_of(c.engine, sources)
    theirs = logits_of(Seq2SeqModel(c.folder, TRANSLATION_FILES["int8"], 1), sources)
    ours = logits_of(open_engine(c, "native", 1), sources)
    assert np.abs(ours - fp32).mean() < 1.2 * np.abs(theirs - fp32).mean()
    assert 0 < np.abs(ours - theirs).mean() < np.abs(theirs - fp32).mean() * 1.2


@pytest.mark.parametrize("family", ["marian", "t5"])
def test_every_instruction_set_gives_the_same_bits(
    case: Callable[[str], Case], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = case(family)
    found = []
    for name in instruction_sets():
        monkeypatch.setenv(VARIABLE, name)
        sentences = decode(c, Generation(beam_size=2, max_length=12), engine=open_engine(c, "native", 1))
        found.append((results(sentences), logits_of(open_engine(c, "native", 1), c.sources[:8])))
    for sentences, logits in found[1:]:
        assert sentences == found[0][0]
        assert (logits == found[0][1]).all()


def test_the_file_is_safetensors_with_the_embedding_once(case: Callable[[str], Case]) -> None:
    file = case("marian").folder / NATIVE_FILE
    assert int8_layers(file) == 2 * 4 + 1 + 2 * 6 + 1
    apart = case("marian, two vocabularies").folder / NATIVE_FILE
    values = []
    for each in (file, apart):
        with safe_open(each, "np") as tensors:
            values.append(sum(tensors.get_tensor(name).nbytes for name in tensors.keys()))  # noqa: SIM118
    panels, scales = 128 * 32, 128 * 4
    assert values[1] - values[0] == panels + scales, "the vocabulary filled up to whole panels"


@pytest.mark.parametrize("search", SEARCHES)
def test_its_selection_matches_its_logits(case: Callable[[str], Case], search: str) -> None:
    """Rules, probabilities, best tokens and both searches in C match those in numpy and Python."""

    class InNumpy(NativeModel):
        run_greedily = None  # so that the decode loop runs each step itself

        def choose(self, tokens: Any, selection: TokenSelection) -> Any:
            return select(self.step(tokens), selection, self.best)

    c = case("marian")
    options = {k: c.task.eos_token_ids[0] if v == "eos" else v for k, v in SEARCHES[search].items()}
    generation = generation_of(options)
    expected = results(decode(c, generation, engine=InNumpy(c.folder, [NATIVE_FILE], 1), max_rows=16))
    found = results(decode(c, generation, engine=open_engine(c, "native", 1), max_rows=16))
    assert [ids for ids, _ in found] == [ids for ids, _ in expected]
    assert [score for _, score in found] == pytest.approx([score for _, score in expected], abs=1e-4, rel=1e-4)


def test_a_penalty_in_another_row_changes_no_bit(case: Callable[[str], Case]) -> None:
    c = case("marian")
    others = [generation_of(SEARCHES[name]) for name in ("greedy", "early stopping")]
    penalized = [
        Generation(max_length=LONGEST, repetition_penalty=1.5),
        Generation(beam_size=2, max_length=LONGEST, repetition_penalty=0.7),
    ]
    kinds = [*others, *penalized]
    alone = [Sentence(source, kinds[i % 4]) for i, source in enumerate(c.sources)]
    for sentence in alone:
        Decoder(open_engine(c, "native", 1), c.task).run([sentence])
    together = [Sentence(source, kinds[i % 4]) for i, source in enumerate(c.sources)]
    Decoder(open_engine(c, "native", 1), c.task, max_rows=24).run(together)
    assert results(together) == results(alone)


def test_beams_are_handed_over_while_other_searches_join_and_leave(case: Callable[[str], Case]) -> None:
    """The library runs beams alone; with a greedy sentence, or one whose rules depend on its tokens, Python does."""
    c = case("marian")
    kinds = [generation_of(SEARCHES[name]) for name in ("early stopping", "early stopping", "greedy", "no repeats")]
    alone = []
    for i, source in enumerate(c.sources):
        sentence = Sentence(source, kinds[i % 4])
        Decoder(open_engine(c, "native", 1), c.task).run([sentence])
        alone.append(sentence)
    sentences = [Sentence(source, kinds[i % 4]) for i, source in enumerate(c.sources)]
    decoder, waiting, held = Decoder(open_engine(c, "native", 1), c.task, max_rows=9), list(sentences), set()
    while waiting or decoder.running or decoder.waiting:
        if waiting and not decoder.waiting:
            decoder.add(waiting.pop(0))
        decoder.step()
        held |= {sentence.held is not None for sentence in decoder.running if sentence.beam}
    assert held == {True, False}
    assert results(sentences) == results(alone)


@pytest.mark.parametrize("options", [{}, {"min_length": 6}, {"forced_bos_token_id": 9}, {"no_repeat_ngram_size": 2}])
def test_a_sentence_that_reuses_a_row_is_translated_as_when_alone(
    case: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    c = case("marian")
    generation, other = generation_of(options), Generation(max_length=7)
    model = open_engine(c, "native", 1)
    alone = []
    for source in c.sources:
        for g in (generation, other):
            sentence = Sentence(source, g)
            Decoder(model, c.task).run([sentence])
            alone.append(sentence)
    replaced: list[int] = []
    replace = NativeModel.replace

    def counted(self: NativeModel, rows: Any, cross: Any, lengths: Any) -> None:
        replaced.extend(rows.tolist())
        replace(self, rows, cross, lengths)

    monkeypatch.setattr(NativeModel, "replace", counted)
    sentences = [Sentence(source, generation) for source in c.sources]
    Decoder(model, c.task, max_rows=5).run(sentences)
    assert results(sentences) == results(alone[::2])
    # Rows are not reused if rules change with the length or the tokens, because a plan's rules apply to all rows.
    assert bool(replaced) == (not options)

    mixed = [Sentence(source, g) for source in c.sources for g in (generation, other)]
    decoder = Decoder(model, c.task, max_rows=16)
    for sentence in mixed:
        decoder.add(sentence)
    mixed[20].cancelled = True
    done = []
    while decoder.waiting or decoder.running:
        done += decoder.step()
        if len(done) > 3:
            mixed[30].cancelled = True
    kept = [i for i in range(len(mixed)) if i not in (20, 30)]
    assert results([mixed[i] for i in kept]) == results([alone[i] for i in kept])
    assert mixed[20].result is None
    assert decoder.claimed == 0


def test_a_prefetched_sentence_is_decoded_when_the_one_before_it_is_cancelled(case: Callable[[str], Case]) -> None:
    c = case("marian")
    model, generation = open_engine(c, "native", 1), Generation(max_length=LONGEST)
    alone = [Sentence(source, generation) for source in c.sources]
    Decoder(model, c.task).run(alone)
    sentences = [Sentence(source, generation) for source in c.sources]
    decoder = Decoder(model, c.task, max_rows=20)
    for sentence in sentences:
        decoder.add(sentence)
    decoder.step()
    rules = decoder.running[0].rules
    assert rules is not None
    assert decoder._encode_successors(rules)
    cancelled = list(decoder.running)
    for sentence in cancelled:
        sentence.cancelled = True
    while decoder.waiting or decoder.running:
        decoder.step()
    kept = [i for i, sentence in enumerate(sentences) if not any(sentence is each for each in cancelled)]
    assert results([sentences[i] for i in kept]) == results([alone[i] for i in kept])
    assert decoder.claimed == 0


def test_threads_change_no_bit(case: Callable[[str], Case]) -> None:
    for family in ("marian", "t5 1.1"):
        c = case(family)
        sources = c.sources[:8]
        expected = logits_of(open_engine(c, "native", 1), sources)
        for threads in (2, 3):
            assert (logits_of(open_engine(c, "native", threads), sources) == expected).all()
        beams = Generation(beam_size=3, max_length=LONGEST)
        found = [results(decode(c, beams, engine=open_engine(c, "native", n))) for n in (1, 3)]
        assert found[0] == found[1]


def test_caches_grow_while_sentences_run(case: Callable[[str], Case]) -> None:
    c = case("marian")
    generation = Generation(beam_size=2, max_length=60, min_length=60)
    model = open_engine(c, "native", 1)
    before = model.cache_bytes(48, 1, 1)
    assert results(decode(c, generation, engine=model, max_rows=4)) == results(decode(c, generation, engine=model))
    assert model.cache_bytes(48, 60, 1) > before


@pytest.mark.parametrize("beams", [1, 3])
def test_sentences_that_outgrow_the_cache_memory_are_started_again(case: Callable[[str], Case], beams: int) -> None:
    c = case("marian")
    generation = Generation(beam_size=beams, max_length=60, min_length=60)
    model = open_engine(c, "native", 1)
    expected = results(decode(c, generation, engine=model))
    tight = model.cache_bytes(4 * beams, 60, 30)
    assert results(decode(c, generation, engine=model, max_rows=32, max_cache_bytes=tight)) == expected


def test_a_token_that_the_model_does_not_have_is_refused(case: Callable[[str], Case]) -> None:
    model = open_engine(case("marian"), "native", 1)
    for ids in ([10**6], [-1]):
        with pytest.raises(EngineError, match="one of the model's 120"):
            model.encode([ids])
    model.admit(model.encode([[3, 4]]), [2], [1])
    with pytest.raises(EngineError, match="one of the model's 120"):
        model.step(np.array([120]))


def rewritten(file: Path, to: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Write ``file`` with a changed header."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 64)
    to.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    return to


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda content: b"", "is not a weight file"),
        (lambda content: content[:5], "is not a weight file"),
        (lambda content: content[:200], "is not a weight file"),
        (lambda content: b"\xff" * 8 + content[8:], "is not a weight file"),
        (lambda content: content[:-64], "is truncated"),
    ],
)
def test_a_broken_file_is_named(case: Callable[[str], Case], tmp_path: Path, damage: Any, says: str) -> None:
    file = tmp_path / NATIVE_FILE
    file.write_bytes(damage((case("marian").folder / NATIVE_FILE).read_bytes()))
    with pytest.raises(CorruptArtifactError, match=says) as caught:
        NativeModel(tmp_path, [NATIVE_FILE], 1)
    assert str(file) in caught.value.message


def test_false_headers_are_refused(case: Callable[[str], Case], tmp_path: Path) -> None:
    file = case("marian").folder / NATIVE_FILE

    def another_format(header: dict[str, Any]) -> None:
        header["__metadata__"]["format"] = "deploykit-native-99"

    def more_inputs(header: dict[str, Any]) -> None:
        model = json.loads(header["__metadata__"]["model"])
        model["decoder"]["layers"][0]["feed_forward_norm"]["gamma"] = model["decoder"]["layers"][0]["up"]["weight"]
        header["__metadata__"]["model"] = json.dumps(model)

    def elsewhere(header: dict[str, Any]) -> None:
        name = next(name for name in header if name != "__metadata__")
        header[name]["data_offsets"] = [2**40, 2**40 + 64]

    for change, error in (
        (another_format, EngineError),
        (more_inputs, CorruptArtifactError),
        (elsewhere, CorruptArtifactError),
    ):
        rewritten(file, tmp_path / NATIVE_FILE, change)
        with pytest.raises(error):
            NativeModel(tmp_path, [NATIVE_FILE], 1)
