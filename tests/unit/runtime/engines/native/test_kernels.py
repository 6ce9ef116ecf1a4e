"""Kernels of the engine ``native`` give the same bits as the plain C ones, in each instruction set of this CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import CFUNCTYPE, POINTER, byref, c_char_p, c_float, c_int, c_int32, c_int64, c_void_p
from typing import Any

import numpy as np
import pytest

from deploykit.errors import UsageError
from deploykit.runtime.engines.native import loader
from deploykit.runtime.engines.native.weights import LinearStruct, NormStruct, StackStruct

if loader.lacks() is not None:
    pytest.skip(f"the engine native does not run here: {loader.lacks()}", allow_module_level=True)

PANEL, MOST_HEADS, TILE_UNIT, TEXT_QUERIES, KEYS_AFTER = 64, 4, 16, 16, 4096
FASTER = [name for name in loader.instruction_sets() if name != loader.SLOW]

Array = np.ndarray[Any, np.dtype[Any]]


class Rows(ctypes.Structure):
    _fields_ = (("given", c_void_p), ("quantized", c_void_p), ("step", c_void_p))


class Group(ctypes.Structure):
    _fields_ = (("row", c_int), ("rows", c_int), ("number", c_int), ("of", c_int))


class Then(ctypes.Structure):
    _fields_ = (("add", c_int), ("activation", c_int), ("factor", c_void_p), ("out", c_void_p))


class Kept(ctypes.Structure):
    _fields_ = (("bytes", c_void_p), ("scale", c_void_p), ("apart", c_int64))


class Places(ctypes.Structure):
    _fields_ = (("table", c_void_p), ("stride", c_int64), ("n", c_int32))


class Attention(ctypes.Structure):
    _fields_ = (
        ("layer", LinearStruct), ("queries", Rows), ("keys", c_void_p), ("key_scale", c_void_p), ("zeros", c_void_p),
        ("key_offset", c_void_p), ("values", c_void_p), ("value_scale", c_void_p), ("scores", c_void_p),
        ("shares", c_void_p), ("most", c_float), ("n", c_int),
    )  # fmt: skip


class TextHead(ctypes.Structure):
    _fields_ = (
        ("query", c_void_p), ("key", c_void_p), ("value", c_void_p), ("bias", c_void_p), ("wide", c_int64),
        ("out_wide", c_int64), ("out", c_void_p), ("scratch", c_void_p), ("n", c_int32),
    )  # fmt: skip


class Found(ctypes.Structure):
    _fields_ = (
        ("sums", c_float * 16), ("highest", c_float), ("threshold", c_float), ("found", c_int32),
        ("values", c_float * 64), ("ids", c_int32 * 64),
    )  # fmt: skip


class Kernels(ctypes.Structure):
    _fields_ = (
        ("name", c_char_p), ("zero", c_int32), ("rows", c_int32), ("matrix_rows", c_int32),
        ("unit", c_int32), ("panels", c_int32), ("queries", c_int32), ("seen_queries", c_int32), ("release", CFUNCTYPE(None)),
        ("give_row", CFUNCTYPE(None, Rows, POINTER(LinearStruct), c_int, c_void_p, c_float)),
        ("normalize", CFUNCTYPE(None, POINTER(NormStruct), c_void_p, c_void_p, c_int)),
        ("tile", CFUNCTYPE(None, Rows, POINTER(LinearStruct), Group, c_int, Then, c_int64)),
        ("embed_column", CFUNCTYPE(None, POINTER(StackStruct), c_int64, c_void_p, c_void_p)),
        ("embed_row", CFUNCTYPE(None, POINTER(StackStruct), c_int64, c_void_p, c_void_p)),
        ("keep", CFUNCTYPE(c_float, c_void_p, c_void_p, c_int, c_int, c_int)),
        ("attend", CFUNCTYPE(None, c_int, c_void_p, POINTER(StackStruct), c_void_p, POINTER(Kept), POINTER(Kept),
                             POINTER(Places), c_void_p, c_void_p)),
        ("attend_text", CFUNCTYPE(None, POINTER(StackStruct), POINTER(TextHead))),
        ("find", CFUNCTYPE(None, POINTER(Found), c_void_p, c_int, c_int, c_int, c_int)),
        ("take_head", CFUNCTYPE(None, POINTER(Attention), POINTER(StackStruct), c_void_p, c_void_p, c_int64)),
        ("attend_head", CFUNCTYPE(None, POINTER(Attention), POINTER(StackStruct), c_int, c_void_p, c_int64, c_int, c_int,
                                  c_void_p, c_int64)),
    )  # fmt: skip


def kernels(name: str) -> Kernels:
    library = loader.open_library()
    library.deploykit_kernels.restype = POINTER(Kernels)
    try:
        table: Kernels = library.deploykit_kernels(loader.instruction_sets().index(name))[0]
    finally:
        library.deploykit_kernels.restype = c_void_p
    assert table.name == name.encode()
    return table


def filled(n: int, to: int = PANEL) -> int:
    return -(-n // to) * to


def empty(*shape: int, dtype: Any = np.float32) -> Array:
    """Return an array aligned to 64 bytes, filled with bytes that no kernel writes by chance."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.full(size + 64, 0x5A, np.uint8)
    begin = -memory.ctypes.data % 64
    return memory[begin : begin + size].view(dtype).reshape(shape)


def aligned(values: Array) -> Array:
    copy = empty(*values.shape, dtype=values.dtype)
    copy[...] = values
    return copy


def floats(random: np.random.Generator, *shape: int) -> Array:
    """Return floats of many magnitudes, with some zeros."""
    values = random.normal(size=shape) * 2.0 ** random.integers(-12, 5, shape) * (random.random(shape) > 0.05)
    return aligned(values.astype(np.float32))


def integers(random: np.random.Generator, *shape: int) -> Array:
    """Return S8 values, a third of them at the ends of the range, where sums are largest."""
    values = random.integers(-127, 128, shape)
    return aligned(np.where(random.random(shape) < 0.33, np.where(values < 0, -127, 127), values).astype(np.int8))


def linear(random: np.random.Generator, inputs: int, columns: int, is_float: bool) -> tuple[LinearStruct, list[Array]]:
    wide, quads = filled(columns), filled(inputs, 4)
    if is_float:
        weight = floats(random, wide // PANEL, inputs, PANEL)
        offset = empty(0, dtype=np.int32)
    else:
        weight = integers(random, wide // PANEL, quads // 4, PANEL, 4)
        offset = aligned(128 * weight.astype(np.int32).sum(axis=(1, 3)).reshape(-1).astype(np.int32))
    scale, bias = floats(random, wide), floats(random, wide)
    struct = LinearStruct(
        weight.ctypes.data, scale.ctypes.data, offset.ctypes.data, bias.ctypes.data, inputs, columns, is_float
    )
    return struct, [weight, scale, offset, bias]


def stack(**fields: Any) -> StackStruct:
    return StackStruct(
        **{name: value.ctypes.data if isinstance(value, np.ndarray) else value for name, value in fields.items()}
    )


Run = Callable[[Kernels, np.random.Generator], list[Array]]


def quantized_rows(
    k: Kernels, random: np.random.Generator, struct: LinearStruct, rows: int
) -> tuple[Rows, list[Array]]:
    wide = filled(struct.in_)
    x = floats(random, rows, wide)
    given, quantized, step = empty(rows, wide), empty(rows + TILE_UNIT, wide, dtype=np.uint8), empty(rows)
    to = Rows(given.ctypes.data, quantized.ctypes.data, step.ctypes.data)
    for row in range(rows):
        k.give_row(to, byref(struct), row, x[row].ctypes.data, 0.37)
    return to, [given, quantized[:rows], step]


def run_linear(
    inputs: int, columns: int, rows: int, *, is_float: bool, add: int = 0, activation: int = 0, factor: bool = False
) -> Run:
    def run(k: Kernels, random: np.random.Generator) -> list[Array]:
        struct, _weights = linear(random, inputs, columns, is_float)
        to, (given, quantized, step) = quantized_rows(k, random, struct, rows)
        wide = filled(columns)
        out, by = floats(random, rows, wide), floats(random, rows, wide)
        groups, units = -(-rows // k.rows), -(-rows // k.unit)
        for number in range(groups):
            first, last = (units * n // groups * k.unit for n in (number, number + 1))
            last = min(last, rows)
            for panel in range(wide // PANEL):
                begin = (first, slice(panel * PANEL, None))
                then = Then(add, activation, by[begin].ctypes.data if factor else None, out[begin].ctypes.data)
                k.tile(to, byref(struct), Group(first, last - first, number, groups), panel, then, wide)
        if k.release:
            k.release()
        read = [given] if is_float else [(quantized - np.uint8(k.zero)), step]
        return [out, *read]

    return run


def run_norm(n: int, *, mean: bool) -> Run:
    def run(k: Kernels, random: np.random.Generator) -> list[Array]:
        x, y = floats(random, filled(n, 16)), empty(filled(n, 16))
        gamma, beta = floats(random, n), floats(random, n)
        k.normalize(byref(NormStruct(gamma.ctypes.data, beta.ctypes.data if mean else None, 1e-5)), x.ctypes.data,
                    y.ctypes.data, n)  # fmt: skip
        return [y]

    return run


def run_activation(kind: int, rows: int, *, factor: bool) -> Run:
    """Run a layer of one input, whose results are its weights."""

    def run(k: Kernels, random: np.random.Generator) -> list[Array]:
        weight, by = aligned(floats(random, PANEL) * np.float32(8)), floats(random, rows, PANEL)
        zeros = aligned(np.zeros(PANEL, np.float32))
        weight[:8] = [0, -0.0, 88, -88, 100, -100, 1e30, -1e30]
        struct = LinearStruct(weight.ctypes.data, None, None, zeros.ctypes.data, 1, PANEL, 1)
        ones, out = aligned(np.ones((rows, PANEL), np.float32)), empty(rows, PANEL)
        then = Then(0, kind, by.ctypes.data if factor else None, out.ctypes.data)
        k.tile(Rows(ones.ctypes.data, None, None), byref(struct), Group(0, rows, 0, 1), 0, then, PANEL)
        return [out]

    return run


def run_embedding(hidden: int, *, column: bool, positions: bool) -> Run:
    def run(k: Kernels, random: np.random.Generator) -> list[Array]:
        tokens, token, x = 70, 67, empty(filled(hidden))
        embedding = (
            integers(random, 2, filled(hidden, 4) // 4, PANEL, 4) if column else integers(random, tokens, hidden)
        )
        scale, at = floats(random, tokens), floats(random, hidden)
        s = stack(embedding=embedding, embedding_scale=scale, hidden=hidden)
        kernel = k.embed_column if column else k.embed_row
        kernel(byref(s), token, at.ctypes.data if positions else None, x.ctypes.data)
        return [x[: filled(hidden, 16)]]

    return run


def run_attention(heads: int, size: int, n: int, *, slots: int, bias: bool) -> Run:
    """Run a decoder's attention, with keys and values in ``slots`` slots of a cache, or contiguous for 0 slots."""

    def run(k: Kernels, random: np.random.Generator) -> list[Array]:
        padded, positions = filled(size, 16), filled(n, 16)
        keys, values = (np.zeros((max(1, slots), heads, positions, padded), np.int8) for _ in range(2))
        key_scale, value_scale = (np.zeros(keys.shape[:-1], np.float32) for _ in range(2))
        table = random.integers(0, max(1, slots), filled(n, 16)).astype(np.int32)
        table[: n // 2] = 0  # runs of one slot, as texts begin
        for t in range(n):
            for g in range(heads):
                for cache, scale, is_value in ((keys, key_scale, 0), (values, value_scale, 1)):
                    vector = floats(random, size)
                    at = table[t] if slots else 0
                    scale[at, g, t] = k.keep(vector.ctypes.data, cache[at, g].ctypes.data, size, t, is_value)
        distances = 11
        biases, query, out = floats(random, heads, distances), floats(random, heads, size), empty(heads, size)
        s = stack(head_size=size, scale=0.125, distances=distances, zero_distance=8, heads=heads)
        scratch = np.zeros(3 * MOST_HEADS * positions, np.float32)
        places = Places(table.ctypes.data if slots else None, heads * positions, n)
        k.attend(heads, scratch.ctypes.data, byref(s), query.ctypes.data,
                 byref(Kept(keys.ctypes.data, key_scale.ctypes.data, positions)),
                 byref(Kept(values.ctypes.data, value_scale.ctypes.data, positions)), byref(places),
                 biases.ctypes.data if bias else None, out.ctypes.data)  # fmt: skip
        return [out, keys, values, key_scale, value_scale]

    return run


def run_text_attention(size: int, n: int, *, bias: bool) -> Run:
    """Run an encoder's attention."""

    def run(k: Kernels, random: np.random.Generator) -> list[Array]:
        wide, distances = filled(3 * size), 2 * n - 1
        packed, out, biases = floats(random, n, wide), empty(n, filled(size)), floats(random, distances)
        scratch = empty((4 + filled(size, 16)) * filled(n, 16))
        s = stack(head_size=size, scale=0.2, distances=distances, zero_distance=n - 1)
        head = TextHead(
            packed.ctypes.data, packed[0, size:].ctypes.data, packed[0, 2 * size :].ctypes.data,
            biases.ctypes.data if bias else None, wide, out.shape[1], out.ctypes.data, scratch.ctypes.data, n,
        )  # fmt: skip
        k.attend_text(byref(s), byref(head))
        return [out]

    return run


def run_head(size: int, n: int, rows: int, *, bias: bool) -> Run:
    """Run a classifier's attention."""

    def run(k: Kernels, random: np.random.Generator) -> list[Array]:
        keys, padded, quads, wide = filled(n), filled(size, 32), filled(size, 4), filled(3 * size)
        named = {
            "keys": np.zeros(keys * quads + KEYS_AFTER, np.int8), "key_scale": np.zeros(keys, np.float32),
            "zeros": np.zeros(keys, np.float32), "key_offset": np.zeros(keys, np.int32),
            "values": np.zeros((keys // 2, padded), np.int32), "value_scale": np.zeros(padded, np.float32),
            "scores": np.zeros((TEXT_QUERIES, keys), np.float32), "shares": np.zeros((TEXT_QUERIES, keys), np.int16),
        }  # fmt: skip
        named = {name: aligned(array) for name, array in named.items()}
        quantized, step = empty(TEXT_QUERIES, filled(size), dtype=np.uint8), empty(TEXT_QUERIES)
        at = {name: array.ctypes.data for name, array in named.items()}
        h = Attention(
            layer=LinearStruct(at["keys"], at["key_scale"], at["key_offset"], at["zeros"], size, n, 0),
            queries=Rows(None, quantized.ctypes.data, step.ctypes.data), most=np.log2(min(32767, 2**31 // 1023 // n)), n=n,
            **at,
        )  # fmt: skip
        packed, out, distances = floats(random, n, wide), empty(rows, filled(size)), 7
        biases = floats(random, distances)
        s = stack(head_size=size, scale=0.2, distances=distances, zero_distance=3, **({"bias": biases} if bias else {}))
        k.take_head(byref(h), byref(s), packed[0, size:].ctypes.data, packed[0, 2 * size :].ctypes.data, wide)
        for first in range(0, rows, k.queries):
            some = min(k.queries, rows - first)
            query, result = packed[first].ctypes.data, out[first].ctypes.data
            k.attend_head(byref(h), byref(s), 0, query, wide, 1 + first, some, result, out.shape[1])
        return [out, named["keys"], named["key_scale"], named["value_scale"]]

    return run


def run_find(n: int, best: int, *, scored: int) -> Run:
    def run(k: Kernels, random: np.random.Generator) -> list[Array]:
        found = Found(highest=-np.inf, threshold=-np.inf)
        for first in range(0, 5 * PANEL, PANEL):
            logits = floats(random, PANEL)
            logits[random.integers(0, PANEL, 5)] = -np.inf
            k.find(byref(found), logits.ctypes.data, first, n, best, scored)
        return [np.frombuffer(bytes(found), np.uint8)]

    return run


CASES: dict[str, Run] = {
    **{
        f"int8 linear {i}x{o}, {r} rows{', added' * add}": run_linear(i, o, r, is_float=False, add=add)
        for i, o, r, add in ((1, 1, 1, 0), (3, 64, 2, 1), (30, 65, 3, 0), (64, 128, 4, 1), (97, 130, 5, 0), (200, 70, 6, 1),
                             (768, 64, 13, 0), (2048, 64, 7, 0), (64, 64, 16, 1), (100, 130, 17, 0), (768, 64, 33, 1), (384, 128, 75, 0),
                             (3, 64, 32, 0), (64, 64, 300, 1))
    },
    **{
        f"int8 linear, {r} rows, activation {a}{', factor' * f}": run_linear(70, 130, r, is_float=False, activation=a, factor=f)
        for a in range(6) for r, f in ((5, False), (40, True))
    },
    **{
        f"float linear {i}x{o}, {r} rows{', added' * add}": run_linear(i, o, r, is_float=True, add=add)
        for i, o, r, add in ((1, 1, 1, 0), (5, 64, 2, 1), (33, 65, 3, 0), (48, 130, 4, 1), (64, 64, 5, 0), (70, 3, 13, 1))
    },
    **{f"norm of {n}{', mean' * mean}": run_norm(n, mean=bool(mean)) for n in (1, 15, 16, 33, 768) for mean in (0, 1)},
    **{f"activation {kind}, {rows} rows": run_activation(kind, rows, factor=rows > 1) for kind in range(6) for rows in (1, 5)},
    **{f"embedding of {n}, from a column": run_embedding(n, column=True, positions=n > 20) for n in (3, 16, 50, 128)},
    **{f"embedding of {n}, from a row": run_embedding(n, column=False, positions=True) for n in (3, 16, 50, 128)},
    **{
        f"attention of {h} heads of {size} to {n}, {slots} slots": run_attention(h, size, n, slots=slots, bias=n % 2 == 0)
        for h, size, n, slots in ((1, 5, 1, 0), (2, 16, 15, 0), (3, 24, 16, 2), (4, 64, 33, 3), (4, 80, 50, 0),
                                  (1, 256, 20, 1), (1, 16, 530, 2))
    },
    **{f"attention of {size} in {n}": run_text_attention(size, n, bias=n % 2 == 0)
       for size, n in ((3, 1), (12, 5), (16, 16), (64, 33), (72, 50))},
    **{f"int8 attention of {size} in {n}, {rows} rows": run_head(size, n, rows, bias=n % 2 == 0)
       for size, n, rows in ((5, 2, 1), (12, 17, 3), (16, 64, 6), (64, 130, 6), (65, 33, 5), (64, 511, 1), (32, 3, 2),
                             (32, 384, 16), (33, 200, 17), (128, 260, 40))},
    **{f"best {best} of {n}{', scored' * scored}": run_find(n, best, scored=scored)
       for n, best, scored in ((64, 4, 0), (64, 1, 1), (50, 64, 1), (3, 5, 0), (17, 0, 1))},
}  # fmt: skip


@pytest.mark.parametrize("isa", FASTER)
@pytest.mark.parametrize("case", CASES)
def test_kernels_equal_the_reference_bit_for_bit(isa: str, case: str) -> None:
    for seed in range(3):
        expected = CASES[case](kernels(loader.SLOW), np.random.default_rng(seed))
        found = CASES[case](kernels(isa), np.random.default_rng(seed))
        for reference, array in zip(expected, found, strict=True):
            same = reference.view(np.uint8) == array.view(np.uint8)
            assert same.all(), f"{(~same).sum()} of {same.size} bytes differ"


def test_the_reference_computes_products_and_norms() -> None:
    """Compare with numpy: the other tests only compare instruction sets with each other."""
    k, random = kernels(loader.SLOW), np.random.default_rng(0)
    struct, (weight, scale, _, bias) = linear(random, 97, 130, False)
    to, (_, quantized, step) = quantized_rows(k, random, struct, 3)
    out = empty(3, 192)
    for panel in range(3):
        k.tile(to, byref(struct), Group(0, 3, 0, 1), panel, Then(out=out[0, panel * PANEL :].ctypes.data), 192)
    columns = weight.transpose(1, 3, 0, 2).reshape(100, 192).astype(np.int64)
    sums = quantized.view(np.int8)[:, :100].astype(np.int64) @ columns
    np.testing.assert_allclose(out, sums * step[:, None] * scale + bias, rtol=1e-5, atol=1e-6)
    x = floats(random, 48)
    y, ones, zeros = empty(48), np.ones(48, np.float32), np.zeros(48, np.float32)
    k.normalize(byref(NormStruct(ones.ctypes.data, zeros.ctypes.data, 1e-5)), x.ctypes.data, y.ctypes.data, 48)
    np.testing.assert_allclose(y, (x - x.mean()) / np.sqrt(x.var() + 1e-5), rtol=1e-4, atol=1e-5)


def test_the_environment_chooses_the_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(loader.VARIABLE, "scalar")
    assert loader.instruction_set() == "scalar"
    library = loader.open_library()
    library.deploykit_isa.restype = c_char_p
    assert library.deploykit_isa() == b"scalar"
    monkeypatch.delenv(loader.VARIABLE)
    loader.open_library()
    assert library.deploykit_isa().decode() == loader.instruction_sets()[0] == loader.instruction_set()


def test_an_instruction_set_that_does_not_run_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(loader.VARIABLE, "sse9")
    with pytest.raises(UsageError, match="DEPLOYKIT_NATIVE_ISA=sse9") as caught:
        loader.open_library()
    assert caught.value.remedy == f"unset it, or choose one of: {', '.join(loader.instruction_sets())}"
