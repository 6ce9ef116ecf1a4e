"""Fixtures for all tests, mainly exports that need no training."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploykit.signals import restored

WORDS = tuple(f"w{i}" for i in range(200))
"""Words that the tiny tokenizer knows; everything else is [UNK]."""


with contextlib.suppress(ImportError):  # the GPU machine has no Hypothesis
    from hypothesis import HealthCheck, settings

    # Seconds say nothing about a test on a machine that is busy.
    settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("busy")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the docs' commands first: of two processes, the one that runs them is busy longest."""
    items.sort(key=lambda item: item.path.name != "test_readme.py")


@pytest.fixture
def usual_signals() -> Iterator[None]:
    """Python's own handlers of Ctrl-C and SIGTERM, whatever a library has set in this process."""
    with restored():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        yield


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A fake GPU; fails if memory or other resources are not released."""
    # The GPU machine collects these tests, and has no tensorrt_rtx, which the fake needs.
    from fake_gpu import FakeDriver, install_driver

    fake = FakeDriver()
    install_driver(monkeypatch, fake)
    yield fake
    gc.collect()
    assert fake.in_use == 0


@pytest.fixture(scope="session")
def tiny_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a random three-label classifier, to be read only."""
    return write_tiny_export(tmp_path_factory.mktemp("tiny") / "export")


@pytest.fixture(scope="session")
def make_tiny_export() -> Callable[..., Path]:
    """``write_tiny_export``, for tests that need other labels or weights."""
    return write_tiny_export


@pytest.fixture(scope="session")
def tiny_translation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a small random Marian model, to be read only."""
    return write_tiny_translation(tmp_path_factory.mktemp("tiny") / "translation")


@pytest.fixture(scope="session")
def tiny_translation_to_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An INT8 export with the graphs of ``export --trt`` and sample rows, to be read only."""
    return write_tiny_translation(tmp_path_factory.mktemp("tiny") / "en-fr", precision="int8", tensorrt=True)


@pytest.fixture(scope="session")
def make_tiny_translation() -> Callable[..., Path]:
    """``write_tiny_translation``, for tests that need another family or precision."""
    return write_tiny_translation


def write_tiny_export(
    folder: Path,
    labels: Sequence[str] = ("negative", "neutral", "positive"),
    *,
    multi_label: bool = False,
    max_length: int = 64,
    seed: int = 0,
) -> Path:
    """Write a whole export of a random classifier: logits = mean of token embeddings x weights.

    Embeddings and weights are small multiples of 1/8, so that float32 sums are exact and every engine and batch size
    gives the same bits. The INT8 files contain the same graph.
    """
    from deploykit.artifacts import write_manifest
    from deploykit.tasks.classification.facts import Classification

    folder.mkdir(parents=True)
    _write_tokenizer(folder / "tokenizer.json")
    _write_graph(folder / "model.onnx", len(WORDS) + 4, len(labels), seed)
    for name in ("model.u8s8.onnx", "model.s8s8.onnx"):
        (folder / name).write_bytes((folder / "model.onnx").read_bytes())
    task = Classification(tuple(labels), max_length=max_length, pad_token_id=0, multi_label=multi_label)
    write_manifest(folder, "export", task, inputs=f"tiny {seed}", metrics={"accuracy": 0.5})
    return folder


def _write_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: i for i, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(path))


def _write_graph(path: Path, vocabulary: int, labels: int, seed: int) -> None:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(seed)
    hidden = 8
    constants = {
        "embeddings": random.integers(-16, 17, (vocabulary, hidden)).astype(np.float32) / 8,
        "weights": random.integers(-8, 9, (hidden, labels)).astype(np.float32) / 8,
        "last": np.array([2], np.int64),
        "tokens": np.array([1], np.int64),
    }
    nodes = [
        helper.make_node("Gather", ["embeddings", "input_ids"], ["embedded"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["column"]),
        helper.make_node("Mul", ["embedded", "column"], ["masked"]),
        helper.make_node("ReduceSum", ["masked", "tokens"], ["total"], keepdims=0),
        helper.make_node("MatMul", ["total", "weights"], ["sums"]),
        helper.make_node("ReduceSum", ["mask", "tokens"], ["count"], keepdims=1),
        helper.make_node("Div", ["sums", "count"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(n, TensorProto.INT64, ["b", "s"]) for n in ("input_ids", "attention_mask")],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", labels])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


@pytest.fixture(scope="session")
def make_tiny_checkpoint() -> Callable[..., Path]:
    """``write_tiny_checkpoint``."""
    return write_tiny_checkpoint


def write_tiny_checkpoint(
    folder: Path, family: str = "bert", *, initializer_range: float = 0.3, positions: int = 40
) -> Path:
    """Write a random two-layer classifier of ``family`` (bert; roberta-prelayernorm: norms before each block) as a
    Hugging Face checkpoint without manifest. It has WORDS as vocabulary, texts of up to ``positions`` - 10, and two
    labels."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

    folder.mkdir(parents=True)
    _write_tokenizer(folder / "tokenizer.json")
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), model_max_length=positions - 8, **names
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, vocab_size=len(WORDS) + 4, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=positions, pad_token_id=0, initializer_range=initializer_range,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, id2label={0: "bad", 1: "good"},
        label2id={"bad": 0, "good": 1},
    )  # fmt: skip
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture
def tuning() -> dict[str, Any]:
    """A record of ``deploykit tune``: the second of three settings was chosen, and the third has no rate within the
    limit."""
    graphs = [("onnxruntime", "int8"), ("openvino", "int8"), ("openvino", "fp32")]
    rounds: list[list[float | None]] = [[100.0], [200.0, 220.0, 210.0], [None]]
    return {
        "name": "<tweets>", "started": "2026-11-25", "command": "deploykit tune", "seconds": 2.0, "max_memory_mb": 800.0,
        "slo": {"figure": "p99", "limit_ms": 50.0}, "texts": {"rows": 3, "mean_chars": 9.0}, "present": 0, "chosen": 1,
        "machine": {"cpu": "x", "cpus": 4, "cpus_usable": 4, "cpu_flags": [], "memory_gb": 8.0, "system": "Linux",
                    "python": "3.11", "packages": {}},
        "warnings": ["other programs used the CPUs"],
        "trials": [
            {"name": f"{engine} {precision}, 2 instances", "engine": engine, "precision": precision,
             "rate_per_s": rates[-1], "memory_mb": 300.0 + 200 * i, "latency_ms": {"p50": 9.0, "p99": 40.0},
             "holds": rates[0] is not None, "verdict": f"why {i}", "rounds": [{"rate_per_s": rate} for rate in rates]}
            for i, ((engine, precision), rates) in enumerate(zip(graphs, rounds))
        ],
    }  # fmt: skip


SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "Save the file before you close the window.",
    "Le vif renard brun saute par-dessus le chien paresseux.",
    "Enregistrez le fichier avant de fermer la fenêtre !",
    "Do you want to open 3 folders, {name}? Yes, 100%.",
    "Voulez-vous ouvrir 3 dossiers, {name} ? Oui, à 100 %.",
)
"""Training texts of the tiny translation models' tokenizers."""


def write_tiny_translation(
    folder: Path,
    family: str = "marian",
    precision: str = "fp32",
    *,
    max_length: int = 128,
    seed: int = 0,
    keep_checkpoint: Path | None = None,
    tensorrt: bool = False,
) -> Path:
    """Write a whole export of a random translation model: ``family`` is marian, m2m_100 or t5.

    Its translations are gibberish, some ended by the end token and some by the length limit.
    ``keep_checkpoint`` is a path to write its checkpoint to. With ``tensorrt`` it has the graphs for fp16 and INT8
    engines, and sample rows.
    """
    import torch

    from deploykit.artifacts import SAMPLES, write_manifest
    from deploykit.graphs.families import read_architecture
    from deploykit.graphs.native_writer import save_native
    from deploykit.graphs.seq2seq import build_decoder, build_encoder, save_graphs
    from deploykit.runtime.engines import NATIVE_FILE, TRANSLATION_FILES
    from deploykit.runtime.engines.protocol import Precision
    from deploykit.runtime.generation import Generation
    from deploykit.tasks.translation.export_tokenizer import save_translation_tokenizer
    from deploykit.tasks.translation.facts import Translation
    from deploykit.tasks.translation.generation_config import generation_config
    from deploykit.tasks.translation.tokenizer import load_translation_tokenizer
    from deploykit.tensorrt.options import TRANSLATOR_GRAPHS

    folder.mkdir(parents=True)
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text(f'{{"model_type": "{family}"}}')
    tokenizer = {"marian": _marian_tokenizer, "m2m_100": _m2m100_tokenizer, "t5": _t5_tokenizer}[family](checkpoint)
    prefix = "translate English to French: " if family == "t5" else None
    save_translation_tokenizer(checkpoint, tokenizer, folder, prefix=prefix)
    shutil.rmtree(checkpoint)

    torch.manual_seed(seed)
    model = _random_model(family, tokenizer, max_length).eval()
    architecture = read_architecture(model)
    kind: Precision = "int8" if precision == "int8" else "fp32"
    ranges = None
    if kind == "int8":
        graphs = build_encoder(architecture), build_decoder(architecture)
        ranges = {name: (-8.0, 8.0) for graph in graphs for name in graph.activations}
    graphs = build_encoder(architecture, ranges), build_decoder(architecture, ranges)
    save_graphs(folder, *graphs, TRANSLATION_FILES[kind])
    if ranges is not None:
        save_native(folder / NATIVE_FILE, architecture, ranges)
    if tensorrt:
        for each, some in (("fp16", None), ("int8", ranges)):
            graphs = (build(architecture, some, standard="fp16") for build in (build_encoder, build_decoder))
            save_graphs(folder, *graphs, TRANSLATOR_GRAPHS[each])
        rows = ({"source": sentence, "target": "x", "origin": "x"} for sentence in SENTENCES)
        (folder / SAMPLES).write_text("".join(json.dumps(row) + "\n" for row in rows))

    config = model.config
    task = Translation(
        "en",
        "fr",
        family,
        vocabulary=config.vocab_size,
        max_source_length=max_length,
        max_target_length=max_length,
        pad_token_id=config.pad_token_id,
        eos_token_ids=(config.eos_token_id,),
        decoder_start_token_id=config.decoder_start_token_id,
        generation=Generation(
            max_length=max_length,
            no_repeat_ngram_size=2,  # random weights would repeat one word for ever
            bad_words=((config.pad_token_id,),),
            forced_bos_token_id=load_translation_tokenizer(folder, "en", "fr").language_token(),
        ),
    )
    inputs = f"tiny {family} {precision} {max_length} {seed}"
    write_manifest(folder, "export", task, inputs=inputs)
    if keep_checkpoint is not None:
        model.generation_config = generation_config(task, task.generation)
        model.save_pretrained(keep_checkpoint)
        tokenizer.save_pretrained(keep_checkpoint)
        write_manifest(keep_checkpoint, "checkpoint", task, inputs=inputs)
    return folder


def _random_model(family: str, tokenizer: Any, max_length: int) -> Any:
    """Return a model of two layers per side, with weights large enough that outputs depend on inputs."""
    from transformers import (
        M2M100Config,
        M2M100ForConditionalGeneration,
        MarianConfig,
        MarianMTModel,
        T5Config,
        T5ForConditionalGeneration,
    )

    size = 1 + max(len(tokenizer) - 1, *getattr(tokenizer, "lang_token_to_id", {"": 0}).values())
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    if family == "t5":
        return T5ForConditionalGeneration(
            T5Config(
                vocab_size=size, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, initializer_factor=3.0,
                decoder_start_token_id=tokenizer.pad_token_id, **ids,
            )
        )  # fmt: skip
    shape = {
        "vocab_size": size, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "init_std": 0.3,
        "max_position_embeddings": max_length, **ids,
    }  # fmt: skip
    if family == "m2m_100":
        return M2M100ForConditionalGeneration(M2M100Config(decoder_start_token_id=tokenizer.eos_token_id, **shape))
    start = {"decoder_vocab_size": size, "decoder_start_token_id": tokenizer.pad_token_id}
    return MarianMTModel(MarianConfig(activation_function="swish", scale_embedding=True, **shape, **start))


def _train_sentencepiece() -> bytes:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 4), model_writer=model, vocab_size=200, hard_vocab_limit=False,
        minloglevel=2, num_threads=1,
    )  # fmt: skip
    return model.getvalue()


def _pieces(model: bytes) -> list[tuple[str, float]]:
    """Return the pieces of a SentencePiece model, except control symbols, with their scores."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    return [(processor.id_to_piece(i), processor.get_score(i)) for i in range(3, processor.get_piece_size())]


def _write_vocabulary(path: Path, *tokens: str) -> str:
    path.write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    return str(path)


def _marian_tokenizer(folder: Path) -> Any:
    from transformers import MarianTokenizer

    model = _train_sentencepiece()
    for name in ("source.spm", "target.spm"):
        (folder / name).write_bytes(model)
    vocabulary = _write_vocabulary(folder / "vocab.json", "</s>", "<unk>", *(p for p, _ in _pieces(model)), "<pad>")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Recommended: pip install sacremoses")
        return MarianTokenizer(str(folder / "source.spm"), str(folder / "target.spm"), vocabulary)


def _m2m100_tokenizer(folder: Path) -> Any:
    from transformers import M2M100Tokenizer

    model = _train_sentencepiece()
    (folder / "sentencepiece.bpe.model").write_bytes(model)
    pieces = [piece for piece, _ in _pieces(model)]
    vocabulary = _write_vocabulary(folder / "vocab.json", "<s>", "<pad>", "</s>", "<unk>", *pieces)
    return M2M100Tokenizer(vocabulary, str(folder / "sentencepiece.bpe.model"), src_lang="en", tgt_lang="fr")


def _t5_tokenizer(folder: Path) -> Any:
    from transformers import T5Tokenizer

    pieces = _pieces(_train_sentencepiece())
    T5Tokenizer([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *pieces]).save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "t5"}')
    return T5Tokenizer.from_pretrained(folder)
