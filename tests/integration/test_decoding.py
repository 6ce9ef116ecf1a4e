"""The graphs and the decode loop match Hugging Face's `generate` on small random models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx import TensorProto, helper
from transformers import (
    GenerationConfig,
    MarianConfig,
    MarianMTModel,
)
from translators import (
    FAMILIES,
    LONGEST,
    SEARCHES,
    Case,
    V,
    case,
    decode,
    generation_of,
    open_engine,
    results,
)

from deploykit.errors import ExportError, UsageError
from deploykit.graphs.families import read_architecture
from deploykit.graphs.seq2seq import Standard, build_decoder, build_encoder, save_graphs
from deploykit.quantization.qdq import Ranges
from deploykit.runtime.decoding import Decoder, Sentence
from deploykit.runtime.engines import TRANSLATION_FILES
from deploykit.runtime.engines.best_tokens import LOG_SOFTMAX, TOP_K, BestTokens
from deploykit.runtime.engines.onnxruntime import int8_kernels
from deploykit.runtime.engines.seq2seq import Seq2SeqModel
from deploykit.runtime.generation import Generation, override
from deploykit.tasks.translation.facts import Translation

__all__ = ["case"]


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokens_are_those_of_generate(case: Callable[[str], Case], family: str, search: str) -> None:
    c = case(family)
    eos, pad = c.task.eos_token_ids[0], c.task.pad_token_id
    options = {k: eos if v == "eos" else v for k, v in SEARCHES[search].items()}
    config = GenerationConfig(max_length=LONGEST, eos_token_id=eos, pad_token_id=pad,
                              decoder_start_token_id=c.task.decoder_start_token_id, **options)  # fmt: skip
    c.model.generation_config = config
    expected, scores = [], []
    with torch.inference_mode():
        longest = max(map(len, c.sources))
        inputs = torch.tensor([source + [pad] * (longest - len(source)) for source in c.sources])
        mask = torch.tensor([[1] * len(source) + [0] * (longest - len(source)) for source in c.sources])
        out = c.model.generate(inputs, attention_mask=mask, return_dict_in_generate=True, output_scores=True)
    for i, row in enumerate(out.sequences.tolist()):
        ids = row[1:]
        expected.append(ids[: ids.index(eos) + 1] if eos in ids else ids)
        scores.append(float(out.sequences_scores[i]) if "num_beams" in options else None)
    actual = results(decode(c, generation_of(options)))
    assert [ids for ids, _ in actual] == expected
    for (_, score), theirs in zip(actual, scores):
        assert theirs is None or score == pytest.approx(theirs, abs=3e-3, rel=3e-3)


@pytest.mark.parametrize("kind", ["fp32", "int8", "native"])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sentence_does_not_depend_on_its_batch(
    case: Callable[[str], Case], family: str, beams: int, kind: str
) -> None:
    c = case(family)
    engine = open_engine(c, kind, 1)
    generation = Generation(beam_size=beams, max_length=LONGEST)
    together = results(decode(c, generation, engine=engine, max_rows=64))
    few = results(decode(c, generation, engine=engine, max_rows=max(beams, 5)))
    assert few == together, "tokens and scores, to the bit"
    alone = results(decode(c, generation, engine=engine, max_rows=beams))
    assert [ids for ids, _ in alone] == [ids for ids, _ in together]
    assert [score for _, score in alone] == pytest.approx([score for _, score in together], abs=1e-4, rel=1e-5)


@pytest.mark.parametrize("kind", ["fp32", "int8", "native"])
@pytest.mark.parametrize("beams", [1, 4])
def test_decoders_side_by_side_find_what_one_finds(case: Callable[[str], Case], beams: int, kind: str) -> None:
    c = dataclasses.replace(case("marian"), sources=case("marian").sources * 3)
    engine = open_engine(c, kind, 2)
    generation = Generation(beam_size=beams, max_length=LONGEST)
    expected = results(decode(c, generation, engine=engine, max_rows=32))
    assert results(decode(c, generation, engine=engine, max_rows=32, workers=2)) == expected
    few = results(decode(c, generation, engine=engine, max_rows=2 * beams, workers=2))
    assert [ids for ids, _ in few] == [ids for ids, _ in expected], "more sentences than rows"


def test_an_error_in_one_of_several_decoders_is_raised(case: Callable[[str], Case]) -> None:
    c = case("marian")
    decoder = Decoder(c.engine, c.task, workers=2)
    generation = Generation(max_length=LONGEST)
    sentences = [Sentence(source, generation) for source in c.sources * 3]
    sentences[40].token_ids = [10**6]  # beyond the embedding
    with pytest.raises(Exception, match="indices element out of data bounds"):
        decoder.run(sentences)


@pytest.mark.parametrize("kind", ["fp32", "native"])
@pytest.mark.parametrize("count", [1, 40, 300])
def test_sentences_are_taken_when_rows_are_free_and_finished_once(
    case: Callable[[str], Case], kind: str, count: int
) -> None:
    c = case("marian")
    generation = Generation(max_length=LONGEST)
    sentences = [Sentence(c.sources[i % len(c.sources)], generation) for i in range(count)]
    decoder = Decoder(open_engine(c, kind, 2), c.task, max_rows=32, workers=2)
    finished: list[Sentence] = []
    taken_before: list[int] = []

    def coming() -> Iterator[Sentence]:
        for sentence in sentences:
            taken_before.append(len(finished))
            yield sentence

    decoder.run(coming(), finished.append)
    assert sorted(map(id, finished)) == sorted(map(id, sentences))
    expected = results(decode(c, generation, engine=open_engine(c, kind, 1)))
    assert results(sentences) == [expected[i % len(expected)] for i in range(count)]
    assert (max(taken_before) > 0) == (count > 64)
    assert decoder.seconds.tokenizing > 0 < decoder.seconds.detokenizing


@pytest.mark.parametrize("good", [0, 10, 200])
def test_an_error_in_the_input_iterator_leaves_the_decoder_unchanged(case: Callable[[str], Case], good: int) -> None:
    c = case("marian")
    generation = Generation(max_length=LONGEST)
    decoder = Decoder(c.engine, c.task, max_rows=32, workers=2)

    def coming() -> Iterator[Sentence]:
        for i in range(good):
            yield Sentence(c.sources[i % len(c.sources)], generation)
        raise UsageError("no more")

    with pytest.raises(UsageError, match="no more"):
        decoder.run(coming())
    assert not decoder.claimed
    sentences = [Sentence(source, generation) for source in c.sources * 3]
    decoder.run(sentences)
    assert results(sentences) == results(decode(c, generation)) * 3


def test_mixed_searches_share_a_batch(case: Callable[[str], Case]) -> None:
    c = case("marian")
    kinds = [generation_of(SEARCHES[name]) for name in ("greedy", "beams", "repetition", "no repeats")]
    mixed = [Sentence(source, kinds[i % len(kinds)]) for i, source in enumerate(c.sources)]
    Decoder(c.engine, c.task, max_rows=16).run(mixed)
    for i, sentence in enumerate(mixed):
        single = Sentence(sentence.token_ids, kinds[i % len(kinds)])
        Decoder(c.engine, c.task).run([single])
        assert sentence.result is not None
        assert single.result is not None
        assert sentence.result.tokens.tolist() == single.result.tokens.tolist()


def test_sentences_join_while_others_run_and_leave_when_they_are_done(case: Callable[[str], Case]) -> None:
    c = case("marian")
    expected = results(decode(c, Generation(max_length=LONGEST)))
    decoder = Decoder(c.engine, c.task, max_rows=8)
    sentences = [Sentence(source, Generation(max_length=LONGEST)) for source in c.sources]
    waiting, most = list(sentences), 0
    while waiting or decoder.running or decoder.waiting:
        for _ in range(2):
            if waiting:
                decoder.add(waiting.pop(0))
        decoder.step()
        most = max(most, len(decoder.running))
    assert results(sentences) == expected
    assert 1 < most <= 8


def test_a_cancelled_sentence_leaves_without_a_result(case: Callable[[str], Case]) -> None:
    c = case("marian")
    decoder = Decoder(c.engine, c.task)
    first, second, third = (Sentence(source, Generation(beam_size=2, max_length=LONGEST)) for source in c.sources[:3])
    for sentence in (first, second):
        decoder.add(sentence)
    decoder.step()
    first.cancelled = third.cancelled = True
    decoder.add(third)
    while decoder.running or decoder.waiting:
        decoder.step()
    assert first.result is None
    assert third.result is None
    assert second.result is not None


def test_sentences_that_outgrow_the_cache_memory_are_started_again(case: Callable[[str], Case]) -> None:
    c = case("marian")
    generation = Generation(max_length=60, min_length=60)
    expected = results(decode(c, generation))
    tight = c.engine.cache_bytes(4, 64, 32)
    assert results(decode(c, generation, max_rows=32, max_cache_bytes=tight)) == expected


def test_int8_runs_int8_kernels_and_stores_the_embedding_once(case: Callable[[str], Case]) -> None:
    c = case("marian")
    assert int8_kernels(c.folder / "decoder.u8s8.onnx") == 2 * 6 + 1, "six layers each, and the projection"
    assert int8_kernels(c.folder / "encoder.u8s8.onnx") == 2 * 4 + 1, "four each, and all keys and values at once"
    assert (c.folder / "shared.u8s8.bin").stat().st_size == V * 32
    assert (c.folder / "shared.bin").stat().st_size == V * 32 * 4


def standard(case: Case, folder: Path, kind: Standard, ranges: Ranges | None = None) -> Seq2SeqModel:
    """Return the graphs in standard ONNX, loaded by the engine."""
    architecture = read_architecture(case.model)
    graphs = [build(architecture, ranges, standard=kind) for build in (build_encoder, build_decoder)]
    for graph in graphs:
        assert [opset.domain for opset in graph.model.opset_import] == [""]
        onnx.checker.check_model(graph.model, full_check=True)
    files = "encoder.onnx", "decoder.onnx", "shared.bin"
    save_graphs(folder, *graphs, files)
    return Seq2SeqModel(folder, files, 1)


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_standard_graphs_find_the_same(case: Callable[[str], Case], family: str, beams: int, tmp_path: Path) -> None:
    """Rows join and leave, and are at different positions. T5's random logits are large: PyTorch's own fp32 rounding
    changes them by 0.05."""
    c = case(family)
    generation = Generation(beam_size=beams, max_length=LONGEST)
    expected = results(decode(c, generation, max_rows=12))
    actual = results(decode(c, generation, engine=standard(c, tmp_path, "fp32"), max_rows=12))
    assert sum(a == b for (a, _), (b, _) in zip(actual, expected)) >= len(expected) - 1
    assert [score for _, score in actual] == pytest.approx(
        [score for _, score in expected], abs=1e-2 if family.startswith("t5") else 1e-4
    )


@pytest.mark.parametrize(
    ("family", "quantized"),
    [("marian", False), ("marian", True), ("m2m_100", False), ("m2m_100", True), ("t5 1.1", False)],
)
def test_standard_graphs_in_half_precision_are_near(
    case: Callable[[str], Case], family: str, quantized: bool, tmp_path: Path
) -> None:
    c = case(family)
    architecture = read_architecture(c.model)
    names = {name for build in (build_encoder, build_decoder) for name in build(architecture).activations}
    half = standard(c, tmp_path, "fp16", dict.fromkeys(names, (-32.0, 32.0)) if quantized else None)
    assert half.cache_bytes(4, 8, 8) == c.engine.cache_bytes(4, 8, 8) / 2
    logits = []
    for engine in (c.engine, half):
        for source in c.sources[:8]:
            engine.admit(engine.encode([source]), [len(source)], [1])
        logits.append(np.stack([engine.step(np.full(8, token)) for token in (5, 6, 7)]))
        engine.remove(np.arange(8))
    fp32, fp16 = logits
    assert np.abs(fp32 - fp16).mean() / fp32.std() < (0.25 if quantized else 0.01)
    assert fp16.dtype == np.float32


def test_the_shape_of_opus_mt_gives_the_tokens_of_generate(tmp_path: Path) -> None:
    torch.manual_seed(0)
    big = {"d_model": 512, "encoder_layers": 6, "decoder_layers": 6, "encoder_attention_heads": 8, "decoder_attention_heads": 8,
           "encoder_ffn_dim": 2048, "decoder_ffn_dim": 2048, "max_position_embeddings": 512, "init_std": 0.06}  # fmt: skip
    size = 59514
    config = MarianConfig(vocab_size=size, decoder_vocab_size=size, activation_function="swish", scale_embedding=True,
                          pad_token_id=size - 1, eos_token_id=0, decoder_start_token_id=size - 1, **big)  # fmt: skip
    model = MarianMTModel(config).eval()
    architecture = read_architecture(model)
    save_graphs(tmp_path, build_encoder(architecture), build_decoder(architecture), TRANSLATION_FILES["fp32"])
    task = Translation("en", "fr", "marian", size, 512, 512, size - 1, (0,), size - 1)
    random = np.random.default_rng(0)
    sources = [[*random.integers(1, size - 1, n).tolist(), 0] for n in (3, 12, 25)]
    for beams in (1, 4):
        model.generation_config = GenerationConfig(num_beams=beams, max_length=12, eos_token_id=0, pad_token_id=size - 1,
                                                   decoder_start_token_id=size - 1, bad_words_ids=[[size - 1]])  # fmt: skip
        with torch.inference_mode():
            expected = [model.generate(torch.tensor([source]))[0].tolist()[1:] for source in sources]
        generation = Generation(beam_size=beams, max_length=12, bad_words=((size - 1,),))
        sentences = [Sentence(source, generation) for source in sources]
        Decoder(Seq2SeqModel(tmp_path, TRANSLATION_FILES["fp32"], 2), task).run(sentences)
        assert [ids for ids, _ in results(sentences)] == expected


def test_an_unknown_family_is_refused_by_name() -> None:
    class Unknown:
        class config:
            model_type = "prophetnet"

    with pytest.raises(ExportError, match="prophetnet"):
        read_architecture(Unknown)


@settings(max_examples=200, deadline=None)
@given(arrays(np.float32, st.tuples(st.integers(1, 4), st.sampled_from([7, 300, 2100])),
              elements=st.floats(-50, 50, width=32)), st.integers(1, 7))  # fmt: skip
def test_the_best_tokens_are_what_a_sort_finds(scores: np.ndarray, k: int) -> None:
    values, columns = BestTokens(1)(scores, k)
    exact = torch.from_numpy(scores).double().log_softmax(-1).numpy()
    # ONNX Runtime's LogSoftmax is off by up to 1.4e-5 on CPUs without AVX-512.
    assert values == pytest.approx(-np.sort(-exact, axis=1)[:, :k], rel=1e-5, abs=2e-5)
    assert values == pytest.approx(np.take_along_axis(exact, columns, axis=1), rel=1e-5, abs=2e-5)
    assert all(len(set(row)) == k for row in columns.tolist())


def test_log_probabilities_are_those_of_pytorch() -> None:
    scores = np.random.default_rng(0).normal(0, 30, (5, 4000)).astype(np.float32)
    expected = torch.from_numpy(scores).double().logsumexp(-1).numpy()
    assert BestTokens(2).log_sums(scores) == pytest.approx(expected, rel=1e-6)
    forbidden = scores.copy()
    forbidden[:, ::2] = -np.inf
    expected = torch.from_numpy(forbidden).double().logsumexp(-1).numpy()
    assert BestTokens(1).log_sums(forbidden) == pytest.approx(expected, rel=1e-6)


def test_log_probabilities_do_not_depend_on_the_rows_beside_them() -> None:
    scores = np.random.default_rng(0).normal(0, 30, (70, 59_514)).astype(np.float32)
    best = BestTokens(2)
    values, columns = best(scores, 8)
    for row in range(70):
        alone = best(scores[row : row + 1], 8)
        assert alone[0].tolist() == values[row : row + 1].tolist()
        assert alone[1].tolist() == columns[row : row + 1].tolist()
    assert best.of(scores, columns[:, 3]).tolist() == values[:, 3].tolist()


def test_the_models_of_one_node_are_what_onnx_builds() -> None:
    value = helper.make_tensor_value_info
    x, y = (value(name, TensorProto.FLOAT, ["r", "v"]) for name in "xy")
    graph = helper.make_graph([helper.make_node("LogSoftmax", ["x"], ["y"])], "g", [x], [y])
    inputs = [value("x", TensorProto.FLOAT, ["r", "w"]), value("k", TensorProto.INT64, [1])]
    outputs = [value("v", TensorProto.FLOAT, ["r", "n"]), value("i", TensorProto.INT64, ["r", "n"])]
    top_k = helper.make_graph([helper.make_node("TopK", ["x", "k"], ["v", "i"])], "g", inputs, outputs)
    for made, kept in ((graph, LOG_SOFTMAX), (top_k, TOP_K)):
        model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="")
        assert model.SerializeToString() == kept


@pytest.mark.parametrize(
    "given",
    [{"beam_size": 0}, {"beam_size": 10_000}, {"beam_size": True}, {"beam_size": 2.5}, {"max_new_tokens": 0},
     {"max_new_tokens": 64}, {"length_penalty": float("nan")}, {"length_penalty": "x"}, {"early_stopping": "maybe"},
     {"repetition_penalty": 0}, {"no_repeat_ngram_size": -1}, {"temperature": 1.0},
     {"min_new_tokens": 20, "max_new_tokens": 10}],
)  # fmt: skip
def test_parameters_that_make_no_sense_are_refused_by_name(case: Callable[[str], Case], given: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(given))):
        override(case("marian").task, given)
