"""ONNX Runtime on CPUs. INT8 graphs must be U8/S8: its CPU kernels are slow on S8 activations.

Source: ONNX Runtime documentation, "Quantize ONNX models" and "Thread management".
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from deploykit.errors import EngineError
from deploykit.runtime.batching import DEFAULT_TOKEN_BUDGET

_INT8_OPS = ("MatMulIntegerToFloat", "QLinearMatMul", "MatMulInteger", "QGemm", "DynamicQuantizeMatMul")


class OnnxRuntimeEngine:
    token_budget = DEFAULT_TOKEN_BUDGET
    computes_padding = True

    def __init__(self, graph: Path, threads: int, device: int = 0) -> None:
        self._graph = graph
        # MatMulAddFusion turns quantized 2-D MatMuls into fp32 Gemms before they become INT8 kernels.
        self._session = open_session(graph, session_options(threads), disabled_optimizers=["MatMulAddFusion"])

    def run(self, inputs: Mapping[str, NDArray[np.int64]]) -> list[NDArray[Any]]:
        outputs: list[NDArray[Any]] = self._session.run(None, dict(inputs))
        return outputs

    def int8_kernels(self) -> int:
        return int8_kernels(self._graph, disabled_optimizers=["MatMulAddFusion"])


def open_session(graph: Path, options: ort.SessionOptions, **settings: Any) -> ort.InferenceSession:
    """Load ``graph`` on the CPU. Raises EngineError naming the file."""
    try:
        return ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"], **settings)
    except Exception as error:  # its exceptions have no common base
        raise EngineError(f"{graph}: ONNX Runtime cannot load it: {error}", "export the model again") from error


def bind_array(bind: Any, name: str, array: NDArray[Any]) -> None:
    """Bind an input or output (``bind``: a method of an IOBinding) to the memory of ``array``, which must stay alive."""
    bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def int8_kernels(graph: Path, **settings: Any) -> int:
    """Return the number of INT8 matrix kernels in the graph that ONNX Runtime optimized ``graph`` to."""
    import onnx  # only export counts kernels; a serving machine has no onnx

    with tempfile.TemporaryDirectory() as folder:
        options = session_options(threads=1)
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        open_session(graph, options, **settings)
        optimized = onnx.load(options.optimized_model_filepath, load_external_data=False)
    return sum(node.op_type in _INT8_OPS for node in optimized.graph.node)


def session_options(threads: int, *, spin: bool = False) -> ort.SessionOptions:
    """Return the options of every session.

    With ``spin``, threads wait for each other actively within a run, and sleep after it.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # it also raises what it logs as an error
    # Waiting threads must leave the CPU to the server and the tokenizer.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spin else "0")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # Without VNNI, U8S8 kernels saturate at 16 bits and silently lose accuracy. This option makes them exact.
    if not _has_vnni():
        options.add_session_config_entry("session.x64quantprecision", "1")
    return options


def _has_vnni() -> bool:
    try:
        return "vnni" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
