"""Language models on the engine ``native``: compared with transformers, with themselves in other company, and with the plain C
kernels; and its errors for broken files."""

from __future__ import annotations

import ctypes
import functools
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from language_models import FAMILIES, random_model

from deploykit.errors import CorruptArtifactError, DeploykitError, EngineError
from deploykit.graphs.causal_architecture import CausalArchitecture, read_causal_architecture
from deploykit.graphs.causal_lm import Bits
from deploykit.graphs.native_causal import NativeCausalWriter, Transform, quantize_channels, quantize_nibbles
from deploykit.quantization.compensated import factor
from deploykit.runtime.engines.causal_lm import Part
from deploykit.runtime.engines.native import loader
from deploykit.runtime.engines.native.causal_lm import NativeCausalLm
from deploykit.runtime.engines.native.causal_weights import BLOCK, CACHES, CausalWeights

runs_here = pytest.mark.skipif(
    loader.lacks() is not None, reason=f"the engine native does not run here: {loader.lacks()}"
)

PRECISIONS: tuple[Bits | None, ...] = (None, 8, 4)
IDS = np.random.default_rng(0).integers(6, 390, 70).tolist()
ODD: dict[str, Any] = {"hidden_size": 40, "head_dim": 20, "intermediate_size": 72, "vocab_size": 393}
"""Sizes that are no multiples of the kernels'."""


@functools.cache
def architecture(name: str, **settings: Any) -> tuple[Any, CausalArchitecture]:
    model = random_model(name, **settings)
    return model, read_causal_architecture(model)


def opened(
    folder: Path, name: str, bits: Bits | None, threads: int = 2, cache: str = CACHES[0], **settings: Any
) -> NativeCausalLm:
    file = folder / "model.safetensors"
    NativeCausalWriter(architecture(name, **settings)[1], cache=cache).save(file, bits)
    return NativeCausalLm(file, threads, context=256, max_rows=8)


def read(model: NativeCausalLm, *parts: list[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return the logits of all tokens of a prompt, read in parts."""
    model.begin()
    return np.concatenate([model.feed(part, range(len(part))).copy() for part in parts])


@runs_here
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    with torch.inference_mode():
        expected = architecture(name)[0](torch.tensor([IDS])).logits[0].numpy()
    most = np.abs(expected).max()
    # The caches are float16. Of these random models, INT4 is only to be near.
    for bits, tolerance, agreement in zip(PRECISIONS, (1e-3, 0.05, 0.5), (0.98, 0.8, 0.4)):
        found = read(opened(tmp_path, name, bits), IDS)
        np.testing.assert_allclose(found, expected, atol=tolerance * most)
        assert (found.argmax(1) == expected.argmax(1)).mean() > agreement


@runs_here
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_types_of_caches_change_logits_little(tmp_path: Path, name: str) -> None:
    expected = read(opened(tmp_path, name, None, cache="fp32"), IDS)
    for cache, tolerance in (("fp16", 1e-3), ("int8", 0.03)):
        found = read(opened(tmp_path, name, None, cache=cache), IDS)
        assert 0 < np.abs(found - expected).max() < tolerance * np.abs(expected).max()


@runs_here
def test_files_of_earlier_versions_are_refused(tmp_path: Path) -> None:
    """They have weights for 16-bit activations that are not transformed."""
    opened(tmp_path, "llama", 8)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'\\"signs\\"', b'\\"sings\\"'))
    with pytest.raises(EngineError, match=f"{file}: an earlier version of deploykit wrote this file") as caught:
        NativeCausalLm(file, 1, context=256)
    assert "export the model again" in str(caught.value)


@runs_here
def test_caches_in_int8_hold_more_tokens_in_the_same_memory(tmp_path: Path) -> None:
    tokens = []
    for cache in ("fp32", "fp16", "int8"):
        opened(tmp_path, "llama", 8, cache=cache, head_dim=64)
        model = NativeCausalLm(tmp_path / "model.safetensors", 1, context=256, max_cache_bytes=1 << 20)
        tokens.append(model.max_tokens)
    assert tokens[1] == pytest.approx(2 * tokens[0], rel=0.01)
    assert tokens[2] == pytest.approx(2 * tokens[1] * 64 / 68, rel=0.01)  # two scales of 4 bytes for 128 values


@runs_here
@pytest.mark.parametrize(("bits", "cache"), [(None, "fp32"), (8, "fp16"), (8, "int8"), (4, "fp16")])
@pytest.mark.parametrize("name", ["mistral", "gemma2", "gpt2", "gpt_neox"])
def test_no_bit_depends_on_company_parts_or_threads(tmp_path: Path, name: str, bits: Bits | None, cache: str) -> None:
    model = opened(tmp_path, name, bits, cache=cache)
    whole = read(model, IDS)
    np.testing.assert_array_equal(read(model, IDS[:1], IDS[1:20], IDS[20:37], IDS[37:]), whole)
    np.testing.assert_array_equal(read(opened(tmp_path, name, bits, threads=1, cache=cache), IDS), whole)
    model.begin()
    model.feed(IDS[:33], [])
    saved = model.saved(0, 33)
    for _ in range(4):
        model.admit(0)
    for begin in (1, 17, 50):  # rows of other lengths join
        model.begin()
        model.feed(IDS[:begin], [])
        model.admit(0)
    model.begin()
    model.restore(saved)
    model.admit(0)
    lengths = np.array([33, 33, 33, 33, 1, 17, 50, 33])
    for step in range(10):
        logits = model.step(np.array(IDS)[lengths])
        np.testing.assert_array_equal(logits, whole[lengths])
        lengths += 1
        if step == 4:
            model.copy([0], [7], 33)
            lengths = lengths[model.remove(np.array([0, 5]))]
    model.begin()
    areas = [model.area, model.new_area()]
    logits = model.mix(
        [IDS[length : length + 1 + row] for row, length in enumerate(lengths)],
        [Part(areas[0], IDS[:21], 1), Part(areas[1], IDS[:9], 0)],
    )
    places = [length + i for row, length in enumerate(lengths) for i in range(1 + row)]
    np.testing.assert_array_equal(logits, whole[[*places, 20]])
    model.keep([1] * model.rows)
    logits = model.mix(
        [[IDS[length + 1]] for length in lengths], [Part(areas[1], IDS[9:14], 5), Part(areas[0], IDS[21:], 0)]
    )
    np.testing.assert_array_equal(logits, whole[[*lengths + 1, *range(9, 14)]])
    model.keep([1] * model.rows)
    model.area = areas[1]
    model.admit(0)
    model.area = areas[0]
    model.release_others()
    lengths = np.array([*lengths + 2, 14])
    np.testing.assert_array_equal(model.step(np.array(IDS)[lengths]), whole[lengths])
    model.remove(np.arange(model.rows))
    np.testing.assert_array_equal(read(model, IDS), whole)


@runs_here
@pytest.mark.parametrize(
    "isa", [name for name in loader.instruction_sets() if name != loader.SLOW] if loader.lacks() is None else []
)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_all_instruction_sets_give_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, isa: str
) -> None:
    settings = {"llama": ODD, "gpt2": {"n_inner": 2100}}.get(name, {})
    for bits, cache in zip(PRECISIONS, CACHES):
        found = []
        for each in (loader.SLOW, isa):
            monkeypatch.setenv(loader.VARIABLE, each)
            model = opened(tmp_path, name, bits, cache=cache, **settings)
            found.append(read(model, IDS[:53]))
            for _ in range(7):
                model.admit(0)
            found[-1] = np.concatenate([found[-1], model.step(np.array(IDS[60:67]))])
        assert not np.isnan(found[0]).any()
        np.testing.assert_array_equal(found[0], found[1])


@runs_here
@pytest.mark.parametrize(("bits", "expected"), [(None, 6), (8, 16), (4, 6)])
def test_amx_takes_more_guesses_of_an_int8_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: Bits | None, expected: int
) -> None:
    names = loader.instruction_sets()
    monkeypatch.setenv(loader.VARIABLE, names[0])
    assert opened(tmp_path, "llama", bits).tokens_of_a_step == (expected if names[0] == "amx" else 6)
    monkeypatch.setenv(loader.VARIABLE, loader.SLOW)
    assert opened(tmp_path, "llama", bits).tokens_of_a_step == 6


@runs_here
def test_an_outlier_leaves_levels_to_the_other_inputs(tmp_path: Path) -> None:
    """Without the transform, a channel that is 40 times as large as the others would leave them 3 of 127 levels."""
    model, _ = architecture("llama", hidden_size=256)
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data[17] = 40.0
        for linear in (
            layer.self_attn.q_proj,
            layer.self_attn.k_proj,
            layer.self_attn.v_proj,
            layer.mlp.gate_proj,
            layer.mlp.up_proj,
        ):
            linear.weight.data[:, 17] /= 40
    NativeCausalWriter(read_causal_architecture(model)).save(tmp_path / "model", 8)
    with torch.inference_mode():
        expected = model(torch.tensor([IDS])).logits[0].numpy()
    found = read(NativeCausalLm(tmp_path / "model", 1, context=256), IDS)
    assert np.sqrt(np.square(found - expected).mean()) < 0.15 * expected.std()  # 0.30 without the transform


@pytest.mark.parametrize(("size", "together"), [(32, 32), (96, 32), (576, 64), (1536, 512), (4096, 512)])
def test_a_transform_keeps_products_and_spreads_an_input(size: int, together: int) -> None:
    random = np.random.default_rng(0)
    transform = Transform(size)
    assert transform.together == together
    inputs, weight = (random.normal(0, 1, shape).astype(np.float32) for shape in ((5, size), (size, 7)))
    transformed = together * transform.weights(inputs.T.copy()).T  # what the engine computes
    np.testing.assert_allclose(transformed @ transform.weights(weight), inputs @ weight, atol=1e-3)
    one = np.zeros((size, 1), np.float32)
    one[size // 2] = 1
    assert sorted(np.abs(together * transform.weights(one))[:, 0]) == [0] * (size - together) + [1] * together


def test_a_factor_is_that_of_the_transformed_inputs() -> None:
    inputs = np.random.default_rng(0).normal(0, 1, (400, 40)).astype(np.float32)
    transform = Transform(64)  # 40 inputs, padded
    wide = np.pad(inputs, ((0, 0), (0, 24)))
    transformed = transform.together * transform.weights(wide.T).T
    found = transform.factor(factor(inputs.T @ inputs))
    assert not np.tril(found, -1).any()
    assert (np.diagonal(found) > 0).all()
    expected = transformed.T @ transformed
    products = np.linalg.inv(found.astype(np.float64).T @ found)
    # ``factor`` adds to the diagonal, and inputs that are always zero count as 1.
    assert np.abs(products - expected).max() < 0.05 * np.abs(expected).max()


def test_quantized_weights_are_near() -> None:
    weight = np.random.default_rng(0).normal(0, 1, (64, 32)).astype(np.float32) * np.float32(1e-3)
    weight[:, 3] = 0
    values, scales = quantize_channels(weight)
    assert np.abs(values * scales - weight).max() <= np.abs(weight).max() / 127 * 0.51
    nibbles, scales, lows = quantize_nibbles(weight)
    assert nibbles.max() <= 15
    scale, low = ((bits.astype(np.uint32) << 16).view(np.float32).repeat(BLOCK, 0) for bits in (scales, lows))
    restored = nibbles.astype(np.float32) * scale + low
    assert np.sqrt(np.square(restored - weight).mean()) < 0.09 * weight.std()
    assert not restored[:, 3].any()
    # Weights that have a minimum and 16 steps stay nearly the same.
    grid = np.random.default_rng(1).integers(0, 16, weight.shape)
    grid[::BLOCK], grid[1::BLOCK] = 0, 15
    weight = (grid * np.float32(0.013) - np.float32(0.071)).astype(np.float32)
    nibbles, *_ = quantize_nibbles(weight)
    np.testing.assert_array_equal(nibbles, grid)


@runs_here
def test_a_file_has_one_tensor_for_embedding_and_head_if_they_are_tied(tmp_path: Path) -> None:
    for name, tied in (("llama yarn", True), ("llama", False)):
        opened(tmp_path, name, 4)
        weights = CausalWeights(tmp_path / "model.safetensors").model
        assert (weights.embedding.weight == weights.head.weight) is tied
        NativeCausalWriter(architecture(name)[1]).save(tmp_path / "model.safetensors", 4, kept={"layers.0.attention"})
        weights = CausalWeights(tmp_path / "model.safetensors").model
        assert (weights.layer[0].qkv.kind, weights.layer[0].up.kind, weights.layer[1].qkv.kind) == (2, 3, 3)


@runs_here
def test_broken_files_are_refused_by_name(tmp_path: Path) -> None:
    opened(tmp_path, "gemma3_text", 8)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    for data in (b"", whole[:100], whole[: length + 40], whole[:-1], b"\xff" * len(whole)):
        file.write_bytes(data)
        with pytest.raises(DeploykitError, match=str(file)):
            NativeCausalLm(file, 1, context=256)
    header = json.loads(whole[8 : 8 + length])

    def with_model(**changes: Any) -> None:
        model = json.loads(header["__metadata__"]["model"])["causal"]
        text = json.dumps(
            {
                **header,
                "__metadata__": {**header["__metadata__"], "model": json.dumps({"causal": {**model, **changes}})},
            }
        )
        text += " " * (-(len(text) + 8) % 64)
        file.write_bytes(struct.pack("<Q", len(text)) + text.encode() + whole[8 + length :])

    for changes in (
        {"hidden": 96},
        {"heads": 3},
        {"head_size": 512},
        {"vocabulary": 401},
        {"ropes": []},
        {"layers": [{}]},
        {"norm": None},
        {"longest": 100},
        {"head": {**json.loads(header["__metadata__"]["model"])["causal"]["head"], "bias": None}},
    ):
        with_model(**changes)
        with pytest.raises(CorruptArtifactError, match=str(file)):
            NativeCausalLm(file, 1, context=256)
    with pytest.raises(EngineError, match="knows 256 positions, not 257"):
        NativeCausalLm(opened_file(tmp_path, "gpt2"), 1, context=257)


def opened_file(folder: Path, name: str) -> Path:
    opened(folder, name, 8)
    return folder / "model.safetensors"


@runs_here
def test_tokens_and_lengths_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = opened(tmp_path, "llama", 8)
    for ids in ([400], [-1]):
        with pytest.raises(EngineError, match="not one of the model's 400"):
            model.feed(ids, [])
    with pytest.raises(EngineError, match="the caches hold 256 tokens of a row"):
        model.feed(IDS * 4, [])


def test_structures_have_the_library_s_fields() -> None:
    """Sizes of the C structures, as a 64-bit compiler lays them out."""
    from deploykit.runtime.engines.native.causal_weights import CausalBatchStruct, CausalLayerStruct, MatrixStruct

    assert [ctypes.sizeof(s) for s in (MatrixStruct, CausalLayerStruct, CausalBatchStruct)] == [
        64,
        4 * 64 + 6 * 24 + 24,
        80,
    ]
