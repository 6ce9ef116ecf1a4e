"""Fixtures shared by all tests: above all an export that needs no training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

WORDS = tuple(f"w{i}" for i in range(200))
"""Words that the tiny tokenizer knows; everything else is [UNK]."""


@pytest.fixture(scope="session")
def tiny_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a random three-label classifier, to be read only."""
    return write_tiny_export(tmp_path_factory.mktemp("tiny") / "export")


@pytest.fixture(scope="session")
def make_tiny_export() -> Callable[..., Path]:
    """``write_tiny_export``, for tests that want other labels or weights."""
    return write_tiny_export


def write_tiny_export(
    folder: Path,
    labels: Sequence[str] = ("negative", "neutral", "positive"),
    *,
    multi_label: bool = False,
    max_length: int = 64,
    seed: int = 0,
) -> Path:
    """Write a whole export of a random classifier: logits = mean of token embeddings x weights.

    Embeddings and weights are small multiples of 1/8, so that float32 adds them up without rounding
    and every engine and batch size gives the same bits. The INT8 files hold the same graph.
    """
    from deploykit.artifacts import write_manifest
    from deploykit.tasks import Classification

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
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
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
