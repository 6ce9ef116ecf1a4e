"""Define the options of TensorRT engines, and parse shapes and sizes as trtexec takes them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deploykit.errors import UsageError

GRAPHS = {
    "fp32": "model.onnx",
    "fp16": "model.fp16.onnx",
    "bf16": "model.bf16.onnx",
    "int8": "model.qdq.onnx",
}
"""Precision -> the file of a classifier's export that its engine is built from."""
PRECISIONS = tuple(GRAPHS)
TRANSLATOR_GRAPHS = {p: (f"encoder.trt.{p}.onnx", f"decoder.trt.{p}.onnx", f"shared.trt.{p}.bin") for p in PRECISIONS}
"""Precision -> the files of a translator's export: graphs in standard ONNX, and the weights of both."""
GPU = r"portable|this-gpu|sm_\d{2,3}"
"""Regular expression of a GPU target."""
BUILDERS = ("auto", "tensorrt", "trtexec", "rtx")
_UNITS = {
    "": 1,
    "K": 1 << 10,
    "M": 1 << 20,
    "G": 1 << 30,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
}
_AXES = {"batch": "batch", "rows": "batch", "tokens": "length", "source": "length", "target": "past"}
"""Dimension of a graph's input -> axis of a profile."""
Range = tuple[int, int, int]
Limits = Mapping[str, int]
"""Upper limits of a model's axes other than batch: ``length``, and ``past`` if it has decoder caches."""
_SHAPE_AXES = {"input_ids": ("batch", "length"), "attention_mask": ("batch", "length"), "past": ("past",)}
"""Axes of the shapes that a user gives, by input; ``past`` is the number of positions of a decoder's caches."""
_SHAPES = ("--minShapes", "--optShapes", "--maxShapes")


@dataclass(frozen=True)
class Profile:
    """Smallest, usual and largest size of each axis: rows of a ``batch``, tokens of a row (``length``), and positions
    of a decoder's caches (``past``, including the new token's).
    """

    ranges: Mapping[str, Range]

    def __str__(self) -> str:
        return ",".join(f"{axis}={':'.join(map(str, range_))}" for axis, range_ in self.ranges.items())

    def shapes(self, dimensions: Sequence[int | str]) -> list[tuple[int, ...]]:
        """Return the smallest, usual and largest shape of an input."""
        return [tuple(d if isinstance(d, int) else self.ranges[_AXES[d]][i] for d in dimensions) for i in range(3)]


@dataclass(frozen=True)
class EngineOptions:
    """Options of engines, as typed. ``precisions`` (default: fp16, with INT8 also int8). ``profiles`` like
    ``batch=1:8:32,length=16:64:128``, for a translator with ``past=1:32:128`` (default: one over all lengths).
    ``workspace`` like ``1GiB``. ``gpu``: ``portable``, ``this-gpu`` or a compute capability like ``sm_86``. ``command``
    is the export's command without builder and GPU; errors of engines that cannot be loaded show it."""

    precisions: tuple[str, ...] = ()
    profiles: tuple[str, ...] = ()
    workspace: str = "1GiB"
    gpu: str = "portable"
    timing_cache: str | None = None
    builder: str = "auto"
    command: str = "deploykit export CHECKPOINT --output-dir EXPORT --trt"

    def check(self) -> None:
        """Raise UsageError naming the first invalid option."""
        for precision in self.precisions:
            if precision not in PRECISIONS:
                raise UsageError(f"unknown --precision {precision!r}", f"choose one of: {', '.join(PRECISIONS)}")
        if self.builder not in BUILDERS:
            raise UsageError(f"unknown --builder {self.builder!r}", f"choose one of: {', '.join(BUILDERS)}")
        if not re.fullmatch(GPU, self.gpu):
            raise UsageError(
                f"unknown --gpu {self.gpu!r}", "give portable, this-gpu, or a compute capability like sm_86"
            )
        parse_size(self.workspace)
        for profile in self.profiles:
            parse_profile(profile)


def parse_profile(text: str, limits: Limits | None = None) -> Profile:
    """Parse ``batch=MIN:OPT:MAX,length=MIN:OPT:MAX``, with ``past`` if ``limits`` have it (None: model unknown).

    Raises UsageError saying what is wrong.
    """
    axes = {"batch": 0, **(limits or {"length": 0, "past": 0})}
    usual = {"batch": "1:8:32", "length": "16:64:128", "past": "1:32:128"}
    shapes = shapes_of_profile(",".join(f"{axis}={usual[axis]}" for axis in axes))
    remedy = "give shapes like " + " ".join(f"{option} {shape}" for option, shape in shapes.items())
    ranges: dict[str, Range] = {}
    for part in text.split(","):
        axis, _, numbers = part.strip().partition("=")
        if axis not in axes:
            raise UsageError(f"profile {text}: unknown axis {axis!r}", remedy)
        if not re.fullmatch(r"\d{1,9}:\d{1,9}:\d{1,9}", numbers):
            raise UsageError(f"profile {text}: {axis} must be three numbers, not {numbers!r}", remedy)
        least, opt, most = map(int, numbers.split(":"))
        if not 1 <= least <= opt <= most:
            raise UsageError(f"profile {text}: {axis} must grow from 1 or more: {numbers}", remedy)
        if axes[axis] and most > axes[axis]:
            raise UsageError(f"profile {text}: the model takes a {axis} of up to {axes[axis]}, not {most}", remedy)
        ranges[axis] = least, opt, most
    for axis in axes:
        if axis not in ranges and (axis != "past" or limits):
            raise UsageError(f"profile {text}: {axis} is missing", remedy)
    return Profile({axis: ranges[axis] for axis in axes if axis in ranges})


def profiles_of_shapes(minimum: Sequence[str], optimum: Sequence[str], maximum: Sequence[str]) -> tuple[str, ...]:
    """Return a profile for each triple of shapes in trtexec's syntax: ``input_ids:8x64,past:64``.

    Raises UsageError naming the option.
    """
    given = dict(zip(_SHAPES, (minimum, optimum, maximum)))
    if len({len(shapes) for shapes in given.values()}) > 1:
        counts = ", ".join(f"{option} {len(shapes)} times" for option, shapes in given.items())
        raise UsageError(
            f"a profile needs three shapes, but these are given: {counts}", "give each option once for each profile"
        )
    return tuple(
        ",".join(
            f"{axis}={':'.join(str(shape.get(axis, '?')) for shape in shapes)}"
            for axis in {a: 0 for s in shapes for a in s}
        )
        for shapes in zip(*([_axes(option, text) for text in texts] for option, texts in given.items()))
    )


def _axes(option: str, text: str) -> dict[str, int]:
    """Parse ``input_ids:8x64`` to the size of each axis."""
    axes: dict[str, int] = {}
    for part in text.split(","):
        name, _, numbers = part.strip().partition(":")
        names = _SHAPE_AXES.get(name)
        if names is None or not re.fullmatch(r"\d{1,9}(x\d{1,9})*", numbers) or numbers.count("x") + 1 != len(names):
            raise UsageError(
                f"{option} {text}: {part.strip()!r} is not the shape of an input",
                "give it like input_ids:8x64 (rows x tokens), for a translator input_ids:8x64,past:64",
            )
        for axis, size in zip(names, map(int, numbers.split("x"))):
            if axes.setdefault(axis, size) != size:
                raise UsageError(f"{option} {text}: {axis} is both {axes[axis]} and {size}", "give one size")
    return axes


def shapes_of_profile(text: str) -> dict[str, str]:
    """Return the options and shapes from which ``profiles_of_shapes`` makes the profile ``text``."""
    ranges = {axis: numbers.split(":") for axis, _, numbers in (part.partition("=") for part in text.split(","))}
    return {
        option: f"input_ids:{ranges['batch'][i]}x{ranges['length'][i]}"
        + (f",past:{ranges['past'][i]}" if "past" in ranges else "")
        for i, option in enumerate(_SHAPES)
    }


def workspace_of_pools(text: str) -> str:
    """Return the size in ``workspace:1GiB``; as with trtexec, MiB without a unit. Accepts ``1GiB`` alone too."""
    size = text.strip().removeprefix("workspace:")
    return f"{size}MiB" if size.isdigit() and size != text.strip() else size


def parse_size(text: str) -> int:
    """Parse ``1GiB``, ``512MiB`` and the like to bytes. Raises UsageError."""
    match = re.fullmatch(r"(\d{1,12})\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in _UNITS or not int(match[1]):
        raise UsageError(f"--memPoolSize {text!r} is not a size", "give one like workspace:512MiB or workspace:1GiB")
    return int(match[1]) * _UNITS[match[2].upper()]


def profiles_of(options: EngineOptions, limits: Limits) -> list[Profile]:
    """Parse the profiles of ``options``, or make the default one. Raises UsageError for one that exceeds ``limits``."""
    default = {axis: (1, min(64, most), most) for axis, most in limits.items()}
    profiles = [parse_profile(text, limits) for text in options.profiles]
    return profiles or [Profile({"batch": (1, 8, 32), **default})]
