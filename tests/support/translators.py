"""Small random translators of each family with their graphs, and helpers to decode with them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    M2M100Config,
    M2M100ForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    T5Config,
    T5ForConditionalGeneration,
)

from deploykit.graphs.families import read_architecture
from deploykit.graphs.native_writer import save_native
from deploykit.graphs.seq2seq import build_decoder, build_encoder, save_graphs
from deploykit.runtime.decoding import Decoder, Sentence
from deploykit.runtime.engines import NATIVE_FILE, TRANSLATION_FILES
from deploykit.runtime.engines.native.loader import lacks
from deploykit.runtime.engines.native.translator import NativeModel
from deploykit.runtime.engines.protocol import DecodeModel
from deploykit.runtime.engines.seq2seq import Seq2SeqModel, cache_names
from deploykit.runtime.generation import Generation
from deploykit.tasks.translation.facts import Translation

V, LONGEST = 120, 24
SHAPE = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
         "encoder_ffn_dim": 64, "decoder_ffn_dim": 48, "max_position_embeddings": 64, "init_std": 0.3}  # fmt: skip


def marian(**changes: Any) -> Any:
    ids = {"pad_token_id": V - 1, "eos_token_id": 0, "decoder_start_token_id": V - 1}
    shape = {**SHAPE, "activation_function": "swish", "scale_embedding": True, **changes}
    model = MarianMTModel(MarianConfig(vocab_size=V, decoder_vocab_size=V, **ids, **shape))
    model.final_logits_bias = torch.nn.Buffer(torch.randn(1, V))
    return model


def m2m100() -> Any:
    return M2M100ForConditionalGeneration(M2M100Config(vocab_size=V, decoder_start_token_id=2, **SHAPE))


def t5(**changes: Any) -> Any:
    shape = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 4, "initializer_factor": 3.0}
    return T5ForConditionalGeneration(T5Config(vocab_size=V, decoder_start_token_id=0, **{**shape, **changes}))


def bart(kind: str = "bart", **changes: Any) -> Any:
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    ids = {"pad_token_id": 1, "eos_token_id": 2, "bos_token_id": 0, "decoder_start_token_id": 2}
    shape = {**SHAPE, "activation_function": "gelu", "scale_embedding": kind == "mbart", **changes}
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(kind, vocab_size=V, **ids, **shape))
    model.final_logits_bias = torch.nn.Buffer(torch.randn(1, V))
    for name, weight in model.named_parameters():
        if "layernorm_embedding" in name or name.endswith("layer_norm.weight"):
            torch.nn.init.normal_(weight, 1.0, 0.2)  # otherwise norms would have no effect
    return model


def mt5(**changes: Any) -> Any:
    from transformers import MT5Config, MT5ForConditionalGeneration

    shape = {
        "d_model": 32,
        "d_kv": 16,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "initializer_factor": 3.0,
        **changes,
    }
    model = MT5ForConditionalGeneration(MT5Config(vocab_size=V, decoder_start_token_id=0, **shape))
    model.lm_head.weight = torch.nn.Parameter(0.3 * torch.randn(V, 32))  # untied, as in the published checkpoint
    return model


FAMILIES: dict[str, Callable[[], Any]] = {
    "marian": marian,
    "marian, two vocabularies": functools.partial(marian, share_encoder_decoder_embeddings=False),
    "marian, heads of 12": functools.partial(marian, d_model=48, init_std=0.2),  # larger ones amplify all rounding
    "marian, uneven": functools.partial(marian, encoder_layers=3, decoder_layers=1, encoder_attention_heads=2),
    "m2m_100": m2m100,
    "bart": bart,
    "mbart": functools.partial(bart, "mbart"),
    "mt5": mt5,
    "t5": t5,
    "t5, heads of 4": functools.partial(t5, d_kv=4),
    "t5 1.1": functools.partial(t5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
}
SEARCHES = {
    "greedy": {},
    "beams": {"num_beams": 4},
    "early stopping": {"num_beams": 3, "length_penalty": 0.6, "early_stopping": True},
    "long and never": {"num_beams": 4, "length_penalty": 2.0, "early_stopping": "never", "no_repeat_ngram_size": 2},
    "negative penalty": {"num_beams": 4, "length_penalty": -1.0, "early_stopping": "never"},
    "renormalized": {"num_beams": 4, "renormalize_logits": True, "suppress_tokens": [44, 46, 107, 18]},
    "renormalized words": {
        "num_beams": 3,
        "renormalize_logits": True,
        "repetition_penalty": 1.2,
        "forced_bos_token_id": 9,
    },
    "no repeats": {"no_repeat_ngram_size": 3, "min_length": 5, "suppress_tokens": [7, 8]},
    "no token twice": {"no_repeat_ngram_size": 1},
    "repetition": {"repetition_penalty": 1.3},
    "words": {"num_beams": 2, "repetition_penalty": 1.3, "forced_bos_token_id": 9, "bad_words_ids": [[5], [11, 12]]},
    "forced, greedy": {"forced_bos_token_id": 9, "forced_eos_token_id": "eos"},
    "forced, beams": {"num_beams": 5, "forced_eos_token_id": "eos", "min_length": 10},
}


@dataclasses.dataclass
class Case:
    model: Any
    folder: Path
    engine: Seq2SeqModel
    task: Translation
    sources: list[list[int]]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    @functools.cache
    def make(family: str) -> Case:
        torch.manual_seed(0)
        model = FAMILIES[family]().eval()
        folder = tmp_path_factory.mktemp("graphs")
        architecture = read_architecture(model)
        save_graphs(folder, build_encoder(architecture), build_decoder(architecture), TRANSLATION_FILES["fp32"])
        calibrated = {
            name: (-8.0, 8.0)
            for g in (build_encoder(architecture), build_decoder(architecture))
            for name in [*g.activations, *cache_names(len(architecture.decoder_layers))]
        }
        graphs = build_encoder(architecture, calibrated), build_decoder(architecture, calibrated)
        save_graphs(folder, *graphs, TRANSLATION_FILES["int8"])
        save_native(folder / NATIVE_FILE, architecture, calibrated)
        config = model.config
        start = config.decoder_start_token_id
        task = Translation("en", "fr", family, V, 64, 64, config.pad_token_id, (config.eos_token_id,), start)
        random = np.random.default_rng(1)
        sources = [[*random.integers(3, V - 2, n).tolist(), config.eos_token_id] for n in random.integers(1, 30, 24)]
        return Case(model, folder, Seq2SeqModel(folder, TRANSLATION_FILES["fp32"], 1), task, sources)

    return make


def open_engine(case: Case, kind: str, threads: int) -> DecodeModel:
    """Open ``fp32`` or ``int8`` on ONNX Runtime, or the engine ``native``."""
    if kind == "native":
        if (reason := lacks()) is not None:
            pytest.skip(f"the engine native does not run here: {reason}")
        return NativeModel(case.folder, [NATIVE_FILE], threads)
    return Seq2SeqModel(case.folder, TRANSLATION_FILES["int8" if kind == "int8" else "fp32"], threads)


def decode(case: Case, generation: Generation, *, engine: DecodeModel | None = None, **limits: Any) -> list[Sentence]:
    sentences = [Sentence(source, generation) for source in case.sources]
    Decoder(engine or case.engine, case.task, **limits).run(sentences)
    return sentences


def results(sentences: list[Sentence]) -> list[tuple[list[int], float]]:
    return [(s.result.tokens.tolist(), s.result.score) for s in sentences if s.result is not None]


def generation_of(options: dict[str, Any]) -> Generation:
    return Generation(
        beam_size=options.get("num_beams", 1),
        max_length=LONGEST,
        bad_words=tuple(map(tuple, options.get("bad_words_ids", ()))),
        suppressed=tuple(options.get("suppress_tokens", ())),
        renormalize=options.get("renormalize_logits", False),
        **{k: v for k, v in options.items() if k in Generation.__dataclass_fields__},
    )
