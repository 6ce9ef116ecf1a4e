"""Serve question answering in Triton, in dynamic batches."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from deploykit.artifacts import Manifest
from deploykit.errors import DataError
from deploykit.runtime.engines import load_engine
from deploykit.runtime.find_graphs import find_graphs
from deploykit.runtime.triton_requests import (
    CancelledError,
    FailedError,
    RefusedError,
    Rows,
    cpu_threads,
    number_parameter,
    numbers,
    parameters_of,
    refuse_unknown,
    strings,
)
from deploykit.tasks.question_answering.facts import MOST_ANSWERS, QuestionAnswering
from deploykit.tasks.question_answering.predictor import Answerer, Pair, load_answerer
from deploykit.tasks.question_answering.spans import Found, Span

_OUTPUTS = (
    ("ANSWER", "TYPE_STRING", 1),
    ("START", "TYPE_INT32", 1),
    ("END", "TYPE_INT32", 1),
    ("SCORE", "TYPE_FP32", 1),
    ("NONE", "TYPE_FP32", 1),
    ("ERROR", "TYPE_STRING", 1),
    ("TOP_ANSWERS", "TYPE_STRING", -1),
    ("TOP_STARTS", "TYPE_INT32", -1),
    ("TOP_ENDS", "TYPE_INT32", -1),
    ("TOP_SCORES", "TYPE_FP32", -1),
)
_NOTHING = Found((), 0.0, 0.0)
_PADDING = Span("", 0, 0, 0.0)


class QuestionAnsweringBackend:
    inputs: Sequence[Mapping[str, Any]] = tuple(
        {"name": name, "data_type": "TYPE_STRING", "dims": [1]} for name in ("QUESTION", "CONTEXT")
    )
    outputs: Sequence[Mapping[str, Any]] = tuple(
        {"name": name, "data_type": kind, "dims": [size]} for name, kind, size in _OUTPUTS
    )

    def __init__(self, config: Mapping[str, Any], folder: Path, manifest: Manifest, device: int) -> None:
        task = manifest.task
        assert isinstance(task, QuestionAnswering)
        graphs = find_graphs(folder, manifest, engine="auto", precision="auto")
        engine = load_engine(graphs.engine, folder / graphs.files[0], cpu_threads(config), device)
        self._answerer = load_answerer(folder, task, engine, token_budget=number_parameter(config, "token_budget", 0))
        # Warm up with short, medium and longest windows: engines compile kernels at the first use of a shape.
        for words in (1, task.max_length // 4, 2 * task.max_length):
            self._answerer.try_all([("a", "a " * words)])

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer a dynamic batch. Requests with the same parameters run together."""
        responses: list[Any] = [None] * len(requests)
        accepted: dict[tuple[int, float | None], list[tuple[int, Rows, list[Pair]]]] = {}
        for i, request in enumerate(requests):
            try:
                if request.is_cancelled():
                    raise CancelledError
                rows = Rows(request, "QUESTION")
                pairs = _pairs(request, rows)
                given = parameters_of(request)
                refuse_unknown(given, ("top_k", "no_answer_threshold"))
                accepted.setdefault((_top_k(given), _threshold(given)), []).append((i, rows, pairs))
            except RefusedError as refusal:
                responses[i] = refusal.response()
        for (top_k, threshold), group in accepted.items():
            answerer = self._answerer if threshold is None else self._answerer.with_threshold(threshold)
            for (i, rows, _), found in zip(group, _find(answerer, [pairs for _, _, pairs in group], top_k)):
                try:
                    wanted = requests[i].requested_output_names()
                    responses[i] = _respond(rows, found, top_k, answerer.task.no_answer_threshold, wanted)
                except RefusedError as refusal:
                    responses[i] = refusal.response()
        return responses

    def close(self) -> None:
        """Do nothing: no request outlives its ``execute``."""


def _find(answerer: Answerer, groups: list[list[Pair]], top_k: int) -> Sequence[list[Found | DataError] | RefusedError]:
    """Answer the pairs of all requests in one run; if that fails, run each request alone."""
    try:
        found = answerer.try_all([pair for group in groups for pair in group], top_k=top_k)
    except Exception as error:
        if len(groups) > 1:
            return [answer for group in groups for answer in _find(answerer, [group], top_k)]
        pb_utils.Logger.log_error(traceback.format_exc())  # for the operator
        return [FailedError(error)]
    ends = np.cumsum([len(group) for group in groups])
    return [found[end - len(group) : end] for group, end in zip(groups, ends)]


def _respond(
    rows: Rows,
    found: list[Found | DataError] | RefusedError,
    top_k: int,
    threshold: float | None,
    wanted: Sequence[str],
) -> Any:
    if isinstance(found, RefusedError):
        raise found
    good = rows.good
    rows.fail({row: one.message for row, one in zip(good, found) if isinstance(one, DataError)})
    results = [_NOTHING] * len(rows.errors)
    for row, one in zip(good, found):
        if isinstance(one, Found):
            results[row] = one
    best = [one.decide(threshold) for one in results]
    top = [[*one.spans, *[_PADDING] * (top_k - len(one.spans))] for one in results]
    tensors: dict[str, Callable[[], Any]] = {
        "ANSWER": lambda: strings("ANSWER", [span.text for span in best]),
        "START": lambda: numbers("START", [span.start for span in best], np.int32),
        "END": lambda: numbers("END", [span.end for span in best], np.int32),
        "SCORE": lambda: numbers("SCORE", [span.score for span in best], np.float32),
        "NONE": lambda: numbers("NONE", [one.none for one in results], np.float32),
        "ERROR": lambda: strings("ERROR", rows.errors),
        "TOP_ANSWERS": lambda: _matrix("TOP_ANSWERS", [[s.text.encode() for s in row] for row in top], np.object_),
        "TOP_STARTS": lambda: _matrix("TOP_STARTS", [[s.start for s in row] for row in top], np.int32),
        "TOP_ENDS": lambda: _matrix("TOP_ENDS", [[s.end for s in row] for row in top], np.int32),
        "TOP_SCORES": lambda: _matrix("TOP_SCORES", [[s.score for s in row] for row in top], np.float32),
    }
    return pb_utils.InferenceResponse([make() for name, make in tensors.items() if name in wanted])


def _matrix(name: str, rows: Sequence[Sequence[Any]], dtype: type[np.generic]) -> Any:
    return pb_utils.Tensor(name, np.array(rows, dtype))


def _pairs(request: Any, rows: Rows) -> list[Pair]:
    """Return the good rows' questions with contexts, and set the error of rows with an unusable context."""
    contexts: list[str] = []
    errors: dict[int, str] = {}
    for row, value in enumerate(pb_utils.get_input_tensor_by_name(request, "CONTEXT").as_numpy().reshape(-1)):
        if not value and row:
            contexts.append(contexts[-1])
            if row - 1 in errors:
                errors[row] = errors[row - 1]
            continue
        try:
            contexts.append(value.decode())
        except UnicodeDecodeError as fault:
            contexts.append("")
            errors[row] = f"the context is not UTF-8: byte {value[fault.start]:#04x} at position {fault.start}"
    rows.fail({row: error for row, error in errors.items() if not rows.errors[row]})
    return [(question, contexts[row]) for row, question in zip(rows.good, rows.texts)]


def _top_k(parameters: Mapping[str, Any]) -> int:
    """Return the request parameter ``top_k``, by default 1."""
    given = parameters.get("top_k", 1)
    if isinstance(given, bool) or not isinstance(given, int) or not 1 <= given <= MOST_ANSWERS:
        raise RefusedError(f"parameter top_k must be an integer from 1 to {MOST_ANSWERS}, not {given!r}")
    return given


def _threshold(parameters: Mapping[str, Any]) -> float | None:
    """Return the request parameter ``no_answer_threshold``, a number or its decimal text; None for the model's own."""
    given = parameters.get("no_answer_threshold")
    if given is None:
        return None
    try:
        value = float("nan") if isinstance(given, bool) else float(given)
    except (TypeError, ValueError):
        value = float("nan")
    if math.isnan(value):
        raise RefusedError(f"parameter no_answer_threshold must be a number, not {given!r}")
    return value
