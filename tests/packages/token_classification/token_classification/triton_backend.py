"""Serve token classification in Triton, in dynamic batches."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from deploykit.artifacts import Manifest
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
    strings,
)
from token_classification.facts import TokenClassification
from token_classification.tagger import load_tagger


class TokenClassificationBackend:
    inputs: Sequence[Mapping[str, Any]] = (INPUT,)
    outputs: Sequence[Mapping[str, Any]] = (
        {"name": "LABELS", "data_type": "TYPE_STRING", "dims": [1]},
        {"name": "ERROR", "data_type": "TYPE_STRING", "dims": [1]},
    )

    def __init__(self, config: Mapping[str, Any], folder: Path, manifest: Manifest, device: int) -> None:
        task = manifest.task
        assert isinstance(task, TokenClassification)
        graphs = find_graphs(folder, manifest, engine="auto", precision="auto")
        engine = load_engine(graphs.engine, folder / graphs.files[0], cpu_threads(config), device)
        self._tagger = load_tagger(folder, task, engine, number_parameter(config, "token_budget", 0))
        for words in (1, task.max_length // 4, task.max_length):  # engines compile kernels at the first use of a shape
            self._tagger.tag(["a " * words])

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer a dynamic batch in one run of the engine."""
        responses: list[Any] = [None] * len(requests)
        accepted: list[tuple[int, Rows]] = []
        for i, request in enumerate(requests):
            try:
                if request.is_cancelled():
                    raise CancelledError
                accepted.append((i, Rows(request)))
            except RefusedError as refusal:
                responses[i] = refusal.response()
        labels = iter(self._tag([rows.texts for _, rows in accepted]))
        for i, rows in accepted:
            try:
                answers = [""] * len(rows.errors)
                for row in rows.good:
                    answer = next(labels)
                    if isinstance(answer, RefusedError):
                        raise answer
                    answers[row] = answer
                responses[i] = self._response(answers, rows, requests[i].requested_output_names())
            except RefusedError as failure:
                responses[i] = failure.response()
        return responses

    def close(self) -> None:
        """Do nothing: no request outlives its ``execute``."""

    def _response(self, answers: Sequence[str], rows: Rows, wanted: Sequence[str]) -> Any:
        found = {"LABELS": answers, "ERROR": rows.errors}
        return pb_utils.InferenceResponse([strings(name, values) for name, values in found.items() if name in wanted])

    def _tag(self, groups: list[list[str]]) -> list[str | RefusedError]:
        """Label the texts of all requests in one run; if that fails, run each request alone."""
        try:
            return [" ".join(labels) for labels in self._tagger.tag([text for group in groups for text in group])]
        except Exception as error:
            if len(groups) > 1:
                return [answer for group in groups for answer in self._tag([group])]
            pb_utils.Logger.log_error(traceback.format_exc())
            return [FailedError(error) for _ in groups[0]]
