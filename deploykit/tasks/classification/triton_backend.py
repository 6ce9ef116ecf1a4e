"""Classification in the backend: a dynamic batch of requests in, labels and scores out."""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from deploykit.artifacts import Manifest
from deploykit.errors import DataError
from deploykit.runtime.engines import load_engine
from deploykit.runtime.find_graphs import find_graphs
from deploykit.runtime.triton_requests import (
    INPUT,
    CancelledError,
    FailedError,
    RefusedError,
    Rows,
    cpu_threads,
    number_parameter,
    parameters_of,
    refuse_unknown,
    repeated,
    strings,
)
from deploykit.tasks.classification.facts import Classification, as_text
from deploykit.tasks.classification.predictor import load_classifier

_SHORT_CHARS = 1000
"""Requests with fewer characters are run even if they are cancelled: asking Triton costs a sixth of the server's share of them."""

_KEPT_TENSORS = 256


@dataclass(frozen=True)
class _Found:
    """Scores, float32 [texts, labels], and labels of a request's texts."""

    scores: NDArray[np.float32]
    labels: list[str]


class ClassificationBackend:
    inputs: Sequence[Mapping[str, Any]] = (INPUT,)
    outputs: Sequence[Mapping[str, Any]] = (
        {"name": "LABEL", "data_type": "TYPE_STRING", "dims": [1]},
        {"name": "SCORES", "data_type": "TYPE_FP32", "dims": [-1]},
        {"name": "ERROR", "data_type": "TYPE_STRING", "dims": [1]},
        {"name": "TOP_LABELS", "data_type": "TYPE_STRING", "dims": [-1]},
        {"name": "TOP_SCORES", "data_type": "TYPE_FP32", "dims": [-1]},
    )

    def __init__(self, config: Mapping[str, Any], folder: Path, manifest: Manifest, device: int) -> None:
        task = manifest.task
        assert isinstance(task, Classification)
        graphs = find_graphs(folder, manifest, engine="auto", precision="auto")
        engine = load_engine(graphs.engine, folder / graphs.files[0], cpu_threads(config), device)
        self._classifier = load_classifier(
            folder, task, engine, token_budget=number_parameter(config, "token_budget", 0)
        )
        self._labels = np.array([label.encode() for label in task.labels], np.object_)
        # Answers share tensors: making one, and copying it to the memory shared with Triton, takes longer than finding it here.
        self._repeated = lru_cache(_KEPT_TENSORS)(repeated)
        # Short, middling and longest texts: engines compile kernels when they first meet a shape.
        for words in (1, task.max_length // 4, task.max_length):
            self._classifier.logits([as_text("a " * words, "a") if task.pair else "a " * words])

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer a dynamic batch: one run of the engine, whatever the number of requests."""
        responses: list[Any] = [None] * len(requests)
        accepted: list[tuple[int, Rows, int]] = []
        for i, request in enumerate(requests):
            try:
                rows = self._rows(request)
                if sum(map(len, rows.texts)) > _SHORT_CHARS and request.is_cancelled():
                    raise CancelledError
                accepted.append((i, rows, self._top_k(request)))
            except RefusedError as refusal:
                responses[i] = refusal.response()
        for (i, rows, top_k), found in zip(accepted, self._found([rows.texts for _, rows, _ in accepted])):
            if isinstance(found, DataError):
                try:
                    found = self._found_alone(rows)
                except RefusedError as refusal:
                    found = refusal
            if isinstance(found, RefusedError):
                responses[i] = found.response()
            else:
                responses[i] = self._answer(rows, found, top_k, requests[i].requested_output_names())
        return responses

    def close(self) -> None:
        """Free the kept tensors. No request outlives its ``execute``."""
        self._repeated.cache_clear()

    def _rows(self, request: Any) -> Rows:
        return Rows(request, pair="TEXT_PAIR", join=as_text) if self._classifier.task.pair else Rows(request)

    def _found(self, groups: list[list[str]]) -> Sequence[_Found | RefusedError | DataError]:
        """Classify each request's texts, in one run; if that fails, run each request separately."""
        try:
            scores = self._classifier.scores([text for group in groups for text in group])
        except Exception as error:
            if len(groups) > 1:
                return [answer for group in groups for answer in self._found([group])]
            if isinstance(error, DataError):
                return [error]
            pb_utils.Logger.log_error(traceback.format_exc())  # for the operator, not for clients
            return [FailedError(error)]
        labels = self._classifier.task.decide(scores)
        ends = list(itertools.accumulate(map(len, groups)))
        return [_Found(scores[begin:end], labels[begin:end]) for begin, end in zip([0, *ends], ends)]

    def _found_alone(self, rows: Rows) -> _Found:
        """Classify the texts that can be classified; other rows get their errors. Raises RefusedError if no text can."""
        errors: dict[int, str] = {}
        found = []
        for row, text in zip(rows.good, rows.texts):
            try:
                found.append(self._classifier.scores([text])[0])
            except DataError as error:
                errors[row] = error.message
        rows.fail(errors)
        scores = np.array(found)
        return _Found(scores, self._classifier.task.decide(scores))

    def _top_k(self, request: Any) -> int:
        """Return the request parameter ``top_k``; absent or above their number, all labels."""
        parameters = parameters_of(request)
        refuse_unknown(parameters, ("top_k",))
        given = parameters.get("top_k", len(self._labels))
        if isinstance(given, bool) or not isinstance(given, int) or given < 1:
            raise RefusedError(f"parameter top_k must be an integer from 1, not {given!r}")
        return min(given, len(self._labels))

    def _answer(self, rows: Rows, found: _Found, top_k: int, wanted: Collection[str]) -> Any:
        size, scores, labels = len(rows.errors), found.scores, found.labels
        if len(rows.good) < size:
            scores, labels = np.zeros((size, len(self._labels)), np.float32), [""] * size
            scores[rows.good] = found.scores
            for row, label in zip(rows.good, found.labels):
                labels[row] = label
        outputs = []
        if "LABEL" in wanted:
            outputs.append(self._repeated("LABEL", labels[0], 1) if size == 1 else strings("LABEL", labels))
        if "SCORES" in wanted:
            outputs.append(pb_utils.Tensor("SCORES", scores))
        if "ERROR" in wanted:
            outputs.append(strings("ERROR", rows.errors) if any(rows.errors) else self._repeated("ERROR", "", size))
        if "TOP_LABELS" in wanted or "TOP_SCORES" in wanted:
            order = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]
            top_labels = self._labels[order]
            top_labels[[row for row, error in enumerate(rows.errors) if error]] = b""
            if "TOP_LABELS" in wanted:
                outputs.append(pb_utils.Tensor("TOP_LABELS", top_labels))
            if "TOP_SCORES" in wanted:
                outputs.append(pb_utils.Tensor("TOP_SCORES", np.take_along_axis(scores, order, axis=1)))
        return pb_utils.InferenceResponse(outputs)
