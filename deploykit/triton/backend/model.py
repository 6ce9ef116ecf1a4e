"""The Triton backend ``deploykit``, which answers texts with a model of any task.

It is a python-based backend: Triton finds this file as ``<backend directory>/deploykit/model.py`` and runs it in one
stub process per instance. A model directory contains data only: config.pbtxt with ``backend: "deploykit"``, and version
folders that ``deploykit package`` wrote. Each task has its own module, in its task folder.

Source: Triton Python backend README, "Python-based backends".
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import locale
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import triton_python_backend_utils as pb_utils

from deploykit.artifacts import Manifest, load_manifest
from deploykit.errors import DeploykitError, first_line
from deploykit.runtime.tracing import stage_spans
from deploykit.runtime.triton_requests import text_parameter
from deploykit.runtime.triton_stage_cpu import StageCpu
from deploykit.tasks.protocol import Task
from deploykit.tasks.registry import DEFAULT, get_task, task_of

# The stub embeds Python without a locale, so open() would read text files as ASCII.
with contextlib.suppress(locale.Error):
    locale.setlocale(locale.LC_CTYPE, "C.UTF-8")


class Backend(Protocol):
    """The part of the backend that a task implements. ``inputs`` and ``outputs`` are in the form of config.pbtxt."""

    inputs: Sequence[Mapping[str, Any]]
    outputs: Sequence[Mapping[str, Any]]

    def __init__(self, config: Mapping[str, Any], folder: Path, manifest: Manifest, device: int) -> None:
        """Load a version folder, on GPU ``device`` if its engine needs one, and run it once.

        Raises DeploykitError.
        """

    def execute(self, requests: Sequence[Any]) -> Any:
        """Handle requests, like ``TritonPythonModel.execute`` of Triton's Python backend."""

    def close(self) -> None:
        """Answer the running requests, then stop."""


class TritonPythonModel:
    @staticmethod
    def auto_complete_config(auto_complete_model_config: Any) -> Any:
        """Add the tensors to a config.pbtxt that names only the backend and, if not classification, the task."""
        config = auto_complete_model_config
        record = config.as_dict()
        task = get_task(json.loads(text_parameter(record, "task", "{}")).get("name", DEFAULT))
        streams = "streams" in record.get("parameters", {})
        if not streams and record["max_batch_size"] == 0:
            config.set_max_batch_size(64)
            if "max_queue_delay_us" in task.settings:
                config.set_dynamic_batching()
        for tensor in _backend(task, streams).inputs:
            config.add_input(dict(tensor))
        present = {output["name"] for output in record["output"]}
        for output in _backend(task, streams).outputs:
            if output["name"] not in present:  # an existing output is more specific: it has the number of labels
                config.add_output(dict(output))
        return config

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        folder = Path(args["model_repository"]) / args["model_version"]
        try:
            manifest = load_manifest(folder, "model")
            backend = _backend(task_of(manifest.task), "streams" in manifest.options)
            stage_spans()
            self._cpu = StageCpu(args["model_name"])
            self._backend = backend(config, folder, manifest, int(args.get("model_instance_device_id", 0)))
        except DeploykitError as error:
            raise pb_utils.TritonModelException(str(error)) from None
        except Exception as error:
            pb_utils.Logger.log_error(traceback.format_exc())
            raise pb_utils.TritonModelException(
                f"{folder}: cannot be loaded: {first_line(error)}\n  remedy: package the model again"
            ) from None
        gc.collect()
        gc.freeze()  # garbage collections while requests wait need not look through the loaded model

    def execute(self, requests: Sequence[Any]) -> Any:
        self._cpu.report()
        with stage_spans().of(requests):
            return self._backend.execute(requests)

    def finalize(self) -> None:
        self._backend.close()
        stage_spans().close()


def _backend(task: Task, streams: bool) -> type[Backend]:
    module, class_name = (task.stream_backend if streams else task.triton_backend).split(":")
    found: type[Backend] = getattr(importlib.import_module(module), class_name)
    return found
