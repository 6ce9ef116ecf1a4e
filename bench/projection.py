"""Measure the output projection's share of a decode step, with ONNX Runtime's profiler or our engine's own counter."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import onnx

from deploykit.runtime.decoding import Decoder, Sentence
from deploykit.runtime.engines import NATIVE_FILE, TRANSLATION_FILES
from deploykit.runtime.engines import seq2seq as engine
from deploykit.runtime.engines.native.translator import NativeModel
from deploykit.runtime.engines.onnxruntime import session_options
from deploykit.runtime.engines.protocol import Precision
from deploykit.tasks.translation.facts import Translation


def projection_share(
    folder: Path, task: Translation, name: str, precision: Precision, threads: int, token_ids: Sequence[Sequence[int]]
) -> float:
    """Return the projection's share of decoder time on the engine ``name``, from 0 to 1, while ``token_ids`` are
    decoded.

    ONNX Runtime's profiler slows small kernels down, so use shares of a step, not its time.
    """
    sentences = [Sentence(ids, task.generation, scored=False) for ids in token_ids]
    if name == "native":
        native = NativeModel(folder, [NATIVE_FILE], threads)
        Decoder(native, task).run(sentences)
        return native.projection_share
    with tempfile.TemporaryDirectory() as traces:

        def profiled(*arguments: Any, **options: Any) -> Any:
            settings = session_options(*arguments, **options)
            settings.enable_profiling = True
            settings.profile_file_prefix = str(Path(traces) / "trace")
            return settings

        with mock.patch.object(engine, "session_options", profiled):
            model = engine.Seq2SeqModel(folder, TRANSLATION_FILES[precision], threads)
        Decoder(model, task).run(sentences)
        model._encoder.end_profiling()
        events = json.loads(Path(model._decoder.end_profiling()).read_text(encoding="utf-8"))
    graph = onnx.load(folder / TRANSLATION_FILES[precision][1], load_external_data=False).graph
    projection = next(node.name for node in graph.node if "logits" in node.output)
    kernels = {f"{projection}_kernel_time": 0, "": 0}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            kernels[event["name"] if event["name"] in kernels else ""] += event["dur"]
    spent = kernels[f"{projection}_kernel_time"]
    assert spent, f"ONNX Runtime has put {projection} into another kernel"
    return spent / sum(kernels.values())
