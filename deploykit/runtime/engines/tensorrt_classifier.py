"""Run classifiers on TensorRT."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.runtime.cuda import Buffer
from deploykit.runtime.engines.tensorrt import EngineProfile, Job, LoadedEngine, Shape


class TensorRtEngine:
    """An encoder on TensorRT. ``graph`` is an engine with its record next to it; ``threads`` is ignored."""

    computes_padding = True

    def __init__(self, graph: Path, threads: int, device: int = 0) -> None:
        self._loaded = loaded = LoadedEngine(graph, device)
        self._profiles = loaded.profiles(dict.fromkeys(loaded.inputs, ("rows", "length")))
        self._types = {name: loaded.dtype(name) for name in (*loaded.inputs, *loaded.outputs)}
        self._buffers = {name: Buffer(loaded.gpu, size) for name, size in self._largest().items()}
        self._jobs: dict[tuple[int, int, int], tuple[Job, dict[str, Shape]]] = {}
        self.token_budget = max(profile.size() for profile in self._profiles)

    def run(self, inputs: Mapping[str, NDArray[np.int64]]) -> list[NDArray[Any]]:
        """Run a batch, in parts if it has more rows than the profiles. Raises EngineError for a length that no profile
        accepts.
        """
        rows, length = next(iter(inputs.values())).shape
        most = max((p.most("rows") for p in self._profiles if p.takes(length=length)), default=0)
        if not most:
            raise self._loaded.too_long(f"texts padded to {length} tokens", "a longer --maxShapes")
        self._loaded.gpu.enter()
        parts = [self._run({n: a[i : i + most] for n, a in inputs.items()}, length) for i in range(0, rows, most)]
        return parts[0] if len(parts) == 1 else [np.concatenate(part) for part in zip(*parts)]

    def int8_kernels(self) -> int:
        """Return the number from the builder's log: engines do not report it."""
        return self._loaded.record.int8_gemms

    def _run(self, inputs: Mapping[str, NDArray[np.int64]], length: int) -> list[NDArray[Any]]:
        given = len(next(iter(inputs.values())))
        profile = next(p for p in self._profiles if p.takes(length=length) and given <= p.most("rows"))
        rows = profile.filled(given)
        for name in self._loaded.inputs:
            view = self._buffers[name].view((rows, length), self._types[name])
            view[:given], view[given:] = inputs[name], inputs[name][-1:]
        job, outputs = self._job(profile, rows, length)
        self._loaded.run(job)
        self._loaded.stream.synchronize()
        return [self._buffers[name].view(shape, self._types[name])[:given].copy() for name, shape in outputs.items()]

    def _job(self, profile: EngineProfile, rows: int, length: int) -> tuple[Job, dict[str, Shape]]:
        """Return the job for ``rows`` rows of ``length`` tokens, and the shapes of its outputs."""
        key = (profile.number, rows, length)
        if key not in self._jobs:
            inputs = dict.fromkeys(self._loaded.inputs, (rows, length))
            outputs = self._loaded.output_shapes(profile.number, inputs)
            sizes = {name: self._bytes(name, shape) for name, shape in {**inputs, **outputs}.items()}
            job = Job(
                profile.number,
                inputs,
                {name: buffer.address for name, buffer in self._buffers.items()},
                [(self._buffers[name], sizes[name]) for name in inputs],
                [(self._buffers[name], sizes[name]) for name in outputs],
                f"{rows} rows of {length} tokens",
            )
            self._jobs[key] = job, outputs
        return self._jobs[key]

    def _largest(self) -> dict[str, int]:
        """Return the largest size of each tensor under any profile, in bytes."""
        sizes: dict[str, int] = {}
        for profile in self._profiles:
            inputs = dict.fromkeys(self._loaded.inputs, (profile.most("rows"), profile.most("length")))
            for name, shape in {**inputs, **self._loaded.output_shapes(profile.number, inputs)}.items():
                sizes[name] = max(sizes.get(name, 0), self._bytes(name, shape))
        return sizes

    def _bytes(self, name: str, shape: Shape) -> int:
        return int(np.prod(shape)) * self._types[name].itemsize
