"""ONNX Runtime on an NVIDIA GPU, for classifiers and question answering in fp32.

Without its CUDA provider, ONNX Runtime silently runs a graph on the CPU. This engine raises EngineError instead.

Source: ONNX Runtime documentation, "CUDA Execution Provider".
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from deploykit.errors import EngineError
from deploykit.runtime.engines.onnxruntime import session_options

PROVIDER = "CUDAExecutionProvider"


class OnnxRuntimeCudaEngine:
    token_budget = 1 << 16  # small batches leave a GPU idle
    computes_padding = True

    def __init__(self, graph: Path, threads: int, device: int = 0) -> None:
        fell_back = EngineError(
            f"{graph}: ONNX Runtime cannot load its CUDA provider, and would run on the CPU",
            "pip uninstall onnxruntime, then pip install 'deploykit[gpu]'; CUDA and cuDNN must match its release",
        )
        if PROVIDER not in ort.get_available_providers():
            raise fell_back
        ort.preload_dlls()  # finds CUDA and cuDNN in the packages that PyTorch installs
        # fp32 means fp32: TF32 would round the inputs of every product to 10 bits.
        cuda = (PROVIDER, {"device_id": device, "use_tf32": 0})
        try:
            self._session = ort.InferenceSession(str(graph), session_options(threads), providers=[cuda])
        except Exception as error:  # its exceptions have no common base
            raise EngineError(f"{graph}: ONNX Runtime cannot load it: {error}", "export the model again") from error
        if self._session.get_providers()[0] != PROVIDER:
            raise fell_back

    def run(self, inputs: Mapping[str, NDArray[np.int64]]) -> list[NDArray[Any]]:
        outputs: list[NDArray[Any]] = self._session.run(None, dict(inputs))
        return outputs

    def int8_kernels(self) -> int:
        return 0
