"""The Triton backend ``deploykit``: texts in, labels and scores out.

A python-based backend: Triton finds this file as ``<backend directory>/deploykit/model.py`` and runs
it in one stub process per instance. A model directory holds data only: config.pbtxt with
``backend: "deploykit"``, and version folders that ``deploykit package`` wrote.

Source: Triton Python backend README, "Python-based backends".
"""

from __future__ import annotations

import contextlib
import json
import locale
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from deploykit.artifacts import load_manifest
from deploykit.errors import DeploykitError
from deploykit.predictor import open_graph
from deploykit.runtime.batching import DEFAULT_TOKEN_BUDGET
from deploykit.runtime.engines import available_cpus
from deploykit.runtime.text import MAX_TEXT_CHARS

# The stub embeds Python without a locale: open() would read text files as ASCII.
with contextlib.suppress(locale.Error):
    locale.setlocale(locale.LC_CTYPE, "C.UTF-8")

INPUT = {"name": "TEXT", "data_type": "TYPE_STRING", "dims": [1]}
OUTPUTS = (
    {"name": "LABEL", "data_type": "TYPE_STRING", "dims": [1]},
    {"name": "SCORES", "data_type": "TYPE_FP32", "dims": [-1]},
    {"name": "ERROR", "data_type": "TYPE_STRING", "dims": [1]},
    {"name": "TOP_LABELS", "data_type": "TYPE_STRING", "dims": [-1]},
    {"name": "TOP_SCORES", "data_type": "TYPE_FP32", "dims": [-1]},
)


class TritonPythonModel:
    @staticmethod
    def auto_complete_config(auto_complete_model_config: Any) -> Any:
        """Tensors of a config.pbtxt that names nothing but the backend."""
        config = auto_complete_model_config
        if config.as_dict()["max_batch_size"] == 0:
            config.set_max_batch_size(64)
            config.set_dynamic_batching()
        config.add_input(dict(INPUT))
        present = {output["name"] for output in config.as_dict()["output"]}
        for output in OUTPUTS:
            if output["name"] not in present:  # those present know more: the number of labels
                config.add_output(dict(output))
        return config

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        folder = Path(args["model_repository"]) / args["model_version"]
        try:
            manifest = load_manifest(folder, "model")
            threads = _parameter(config, "threads", 0) or _share_of_cpus(config)
            budget = _parameter(config, "token_budget", DEFAULT_TOKEN_BUDGET)
            self._classifier = open_graph(folder, manifest, threads=threads, token_budget=budget)
            self._labels = np.array([label.encode() for label in manifest.task.labels], np.object_)
            self._warm_up(manifest.task.max_length)
        except DeploykitError as error:
            raise pb_utils.TritonModelException(str(error)) from None
        except Exception as error:
            pb_utils.Logger.log_error(traceback.format_exc())
            raise pb_utils.TritonModelException(
                f"{folder}: cannot be loaded: {_first_line(error)}\n  remedy: package the model again"
            ) from None

    def _warm_up(self, max_length: int) -> None:
        """Run short, middling and longest texts: engines compile kernels when they first meet a shape."""
        for words in (1, max_length // 4, max_length):
            self._classifier.scores(["a " * words])

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer a dynamic batch: one run of the engine, whatever the number of requests."""
        responses: list[Any] = [None] * len(requests)
        accepted: list[tuple[int, _Rows, int]] = []
        for i, request in enumerate(requests):
            try:
                if request.is_cancelled():
                    raise _RefusedError("the client cancelled the request", pb_utils.TritonError.CANCELLED)
                rows = _Rows(pb_utils.get_input_tensor_by_name(request, "TEXT").as_numpy())
                accepted.append((i, rows, self._top_k(request)))
            except _RefusedError as refusal:
                responses[i] = refusal.response()
        answers = self._scores([rows.texts for _, rows, _ in accepted])
        for (i, rows, top_k), scores in zip(accepted, answers):
            if isinstance(scores, _RefusedError):
                responses[i] = scores.response()
            else:
                responses[i] = self._answer(rows, scores, top_k, requests[i].requested_output_names())
        return responses

    def _scores(self, groups: list[list[str]]) -> Sequence[NDArray[np.float32] | _RefusedError]:
        """Scores of each request's texts, all in one run; should that fail, each request in its own."""
        try:
            scores = self._classifier.scores([text for group in groups for text in group])
        except Exception as error:
            if len(groups) > 1:
                return [answer for group in groups for answer in self._scores([group])]
            pb_utils.Logger.log_error(traceback.format_exc())  # for the operator: it is no answer to a client
            refusal = f"the model failed on this request: {type(error).__name__}"
            return [_RefusedError(refusal, pb_utils.TritonError.INTERNAL)]
        return np.split(scores, np.cumsum([len(group) for group in groups])[:-1])

    def _top_k(self, request: Any) -> int:
        """The request parameter ``top_k``; absent, all labels."""
        given = json.loads(request.parameters() or "{}").get("top_k", len(self._labels))
        if isinstance(given, bool) or not isinstance(given, int) or not 1 <= given <= len(self._labels):
            raise _RefusedError(f"parameter top_k must be an integer from 1 to {len(self._labels)}, not {given!r}")
        return given

    def _answer(self, rows: _Rows, scores: NDArray[np.float32], top_k: int, wanted: Sequence[str]) -> Any:
        all_scores = np.zeros((len(rows.errors), len(self._labels)), np.float32)
        all_scores[rows.good] = scores
        outputs = []
        if "LABEL" in wanted:
            labels = np.full((len(rows.errors), 1), b"", np.object_)
            labels[rows.good, 0] = [label.encode() for label in self._classifier.task.decide(scores)]
            outputs.append(pb_utils.Tensor("LABEL", labels))
        if "SCORES" in wanted:
            outputs.append(pb_utils.Tensor("SCORES", all_scores))
        if "ERROR" in wanted:
            errors = [[error.encode()] for error in rows.errors]
            outputs.append(pb_utils.Tensor("ERROR", np.array(errors, np.object_)))
        if "TOP_LABELS" in wanted or "TOP_SCORES" in wanted:
            order = np.argsort(-all_scores, axis=1, kind="stable")[:, :top_k]
            top_labels = self._labels[order]
            top_labels[[row for row, error in enumerate(rows.errors) if error]] = b""
            if "TOP_LABELS" in wanted:
                outputs.append(pb_utils.Tensor("TOP_LABELS", top_labels))
            if "TOP_SCORES" in wanted:
                outputs.append(pb_utils.Tensor("TOP_SCORES", np.take_along_axis(all_scores, order, axis=1)))
        return pb_utils.InferenceResponse(outputs)


class _RefusedError(Exception):
    """A request that gets an error instead of an answer; the others of its batch do not notice."""

    def __init__(self, message: str, code: Any = None) -> None:
        super().__init__(message)
        self._code = pb_utils.TritonError.INVALID_ARG if code is None else code

    def response(self) -> Any:
        return pb_utils.InferenceResponse([], error=pb_utils.TritonError(str(self), self._code))


class _Rows:
    """One request's texts: the ``good`` rows' ``texts``, and an error ("" if none) for every row."""

    def __init__(self, raw: NDArray[np.object_]) -> None:
        self.texts: list[str] = []
        self.good: list[int] = []
        self.errors: list[str] = []
        for row, value in enumerate(raw.reshape(-1)):
            error = ""
            try:
                text = value.decode()
                if len(text) > MAX_TEXT_CHARS:
                    error = f"the text has {len(text)} characters, the most accepted is {MAX_TEXT_CHARS}"
            except UnicodeDecodeError as fault:
                error = f"the text is not UTF-8: byte {value[fault.start]:#04x} at position {fault.start}"
            self.errors.append(error)
            if not error:
                self.good.append(row)
                self.texts.append(text)
        if not self.good:
            where = "TEXT has no rows" if not self.errors else f"row 0 of TEXT: {self.errors[0]}"
            raise _RefusedError(where)


def _parameter(config: dict[str, Any], name: str, default: int) -> int:
    """A whole number >= 0 from the parameters of config.pbtxt."""
    text = config.get("parameters", {}).get(name, {}).get("string_value", str(default))
    if not text.isascii() or not text.isdigit():
        raise DeploykitError(f"config.pbtxt: parameter {name} is {text!r}", "make it a whole number, 0 or more")
    return int(text)


def _share_of_cpus(config: dict[str, Any]) -> int:
    """Twice the CPUs among the instances: while one packs its answers, another may use them all."""
    instances = sum(group.get("count", 1) for group in config.get("instance_group", [])) or 1
    return min(available_cpus(), max(1, 2 * available_cpus() // instances))


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
