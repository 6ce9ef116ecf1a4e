"""OpenVINO on CPUs. It runs symmetric S8/S8 Q/DQ graphs as they are.

Source: OpenVINO documentation, "CPU device" and "Inference precision".
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from deploykit.errors import EngineError
from deploykit.runtime.batching import DEFAULT_TOKEN_BUDGET
from deploykit.runtime.signal_stack import kept_signal_stack

_MATRIX_LAYERS = ("FullyConnected", "MatMul", "FullyConnectedQuantized")


class OpenVinoEngine:
    token_budget = DEFAULT_TOKEN_BUDGET
    computes_padding = True

    def __init__(self, graph: Path, threads: int, device: int = 0) -> None:
        properties = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            # Otherwise CPUs with bfloat16 compute the unquantized parts in it: the answers then differ from those
            # in the accuracy table, and an INT8 graph is no faster.
            "INFERENCE_PRECISION_HINT": "f32",
            "ENABLE_CPU_PINNING": False,  # several instances would pin their threads to the same cores
        }
        try:
            with kept_signal_stack():
                self._compiled = ov.Core().compile_model(str(graph), "CPU", properties)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]  # earlier lines are positions in OpenVINO's source
            raise EngineError(f"{graph}: OpenVINO cannot load it: {reason}", "export the model again") from error
        self._request = self._compiled.create_infer_request()
        self._inputs = {name: port for port in self._compiled.inputs for name in port.get_names()}

    def run(self, inputs: Mapping[str, NDArray[np.int64]]) -> list[NDArray[Any]]:
        for name, array in inputs.items():
            self._request.set_tensor(self._inputs[name], ov.Tensor(array, shared_memory=True))
        self._request.infer()
        return [np.array(self._request.get_tensor(port).data) for port in self._compiled.outputs]

    def int8_kernels(self) -> int:
        count = 0
        for op in self._compiled.get_runtime_model().get_ops():
            info = op.get_rt_info()
            layer = info["layerType"].astype(str) if "layerType" in info else ""
            precision = info["runtimePrecision"].astype(str) if "runtimePrecision" in info else ""
            count += layer in _MATRIX_LAYERS and precision in ("i8", "u8", "I8", "U8")
        return count
