"""Serve translation in Triton: requests join the running batch, and each is answered when its texts are done.

``execute`` returns before its requests are answered. Triton documents that for decoupled models only, which plain HTTP
cannot call; but any request's response sender may be used later, once and from any thread (tried with 24.10). If this
process dies, Triton does not notice the requests that it has not answered: see ``TritonServer.heal``.

Source: Triton Python backend README, "Decoupled mode".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import triton_python_backend_utils as pb_utils

from deploykit.artifacts import Manifest
from deploykit.errors import DataError, DeploykitError, UsageError
from deploykit.runtime.decode_loop import DecodeLoop
from deploykit.runtime.decoding import MAX_CACHE_BYTES, longest_first
from deploykit.runtime.find_graphs import find_graphs
from deploykit.runtime.finite import NoNumberError
from deploykit.runtime.generation import MAX_ROWS, PARAMETERS, RENAMED, Generation, override
from deploykit.runtime.serving_settings import LongInput, Split
from deploykit.runtime.triton_decoding import LoadMetrics, RequestTrace, log_error, send_failure, send_last, submit
from deploykit.runtime.triton_requests import (
    INPUT,
    FailedError,
    RefusedError,
    Rows,
    cpu_threads,
    number_parameter,
    numbers,
    parameters_of,
    refuse_unknown,
    strings,
    text_parameter,
)
from deploykit.tasks.translation.facts import Translation
from deploykit.tasks.translation.predictor import Job, Translator, load_translator
from deploykit.tasks.translation.translated import Translated

_LONG_INPUT = "long_input"
_SPLIT = "split"
_NOT_WHOLE = ("length_penalty", "repetition_penalty")  # sent as strings: Triton has no floating-point parameters


class TranslationBackend:
    inputs: Sequence[Mapping[str, Any]] = (INPUT,)
    outputs: Sequence[Mapping[str, Any]] = (
        {"name": "TRANSLATION", "data_type": "TYPE_STRING", "dims": [1]},
        {"name": "SCORE", "data_type": "TYPE_FP32", "dims": [1]},
        {"name": "SOURCE_TOKENS", "data_type": "TYPE_INT32", "dims": [1]},
        {"name": "TARGET_TOKENS", "data_type": "TYPE_INT32", "dims": [1]},
        {"name": "FINISH", "data_type": "TYPE_STRING", "dims": [1]},
        {"name": "ERROR", "data_type": "TYPE_STRING", "dims": [1]},
    )

    def __init__(self, config: Mapping[str, Any], folder: Path, manifest: Manifest, device: int) -> None:
        task = manifest.task
        assert isinstance(task, Translation)
        max_rows = number_parameter(config, "max_rows", MAX_ROWS)
        max_cache_mb = number_parameter(config, "max_cache_mb", MAX_CACHE_BYTES >> 20)
        if not max_rows:
            raise DeploykitError("config.pbtxt: parameter max_rows is '0'", "make it 1 or more")
        self._long_input = _long_input(text_parameter(config, _LONG_INPUT, "split"), "config.pbtxt: parameter ")
        self._split = _split(text_parameter(config, _SPLIT, "sentence"), "config.pbtxt: parameter ")
        graphs = find_graphs(folder, manifest, engine="auto", precision="auto")
        load = partial(
            load_translator,
            folder,
            task,
            graphs.files,
            cpu_threads(config),
            engine=graphs.engine,
            device=device,
            max_rows=max_rows,
            max_cache_bytes=max_cache_mb << 20,
        )
        self._loop = DecodeLoop(
            lambda: _warmed_up(load()),
            max_queue=number_parameter(config, "max_queue", 1024),
            in_flight=number_parameter(config, "in_flight", 1) > 0,
            report=LoadMetrics(config).report,
            log_error=log_error,
            trace=lambda client, stages: client.trace.add(stages),
        )

    def execute(self, requests: Sequence[Any]) -> None:
        """Submit the requests to the decode loop, which answers them later."""
        for request in requests:
            try:
                self._submit(request)
            except RefusedError as refusal:
                send_last(request.get_response_sender(), refusal.response())
            except Exception as error:
                log_error(error)
                send_last(request.get_response_sender(), FailedError(error).response())

    def close(self) -> None:
        self._loop.close()

    def _submit(self, request: Any) -> None:
        trace = RequestTrace(request)
        rows = Rows(request)
        generation, long_input, split = self._search(parameters_of(request))
        scored = "SCORE" in request.requested_output_names()
        begin = partial(
            self._loop.model.begin, generation=generation, long_input=long_input, split=split, scored=scored
        )
        jobs: list[Job] = []
        errors: dict[int, str] = {}
        for row, text in zip(rows.good, rows.texts):
            try:
                jobs += begin([text])
            except DataError as error:
                errors[row] = f"{error.message.removeprefix('text 0: ')} ({error.remedy})"
        rows.fail(errors)
        sentences = [sentence for job in jobs for sentence in job.sentences]
        submit(self._loop, _Client(request, rows, jobs, self._loop.model, trace), longest_first(sentences))

    def _search(self, given: dict[str, Any]) -> tuple[Generation, LongInput, Split]:
        """Parse the request parameters. Raises RefusedError naming the first that is unknown or wrong."""
        refuse_unknown(given, (*PARAMETERS, _LONG_INPUT, _SPLIT), RENAMED)
        long_input, split = self._long_input, self._split
        try:
            if _SPLIT in given:
                split = _split(given.pop(_SPLIT))
            if _LONG_INPUT in given:
                long_input = _long_input(given.pop(_LONG_INPUT))
            for name in _NOT_WHOLE:
                if isinstance(given.get(name), str):
                    given[name] = _number(given[name])
            translator = self._loop.model
            return override(translator.task, given, max_beams=translator.decoder.max_rows), long_input, split
        except UsageError as error:
            raise RefusedError(f"{error.message}: {error.remedy}") from None


class _Client:
    """The client of one Triton request."""

    def __init__(
        self, request: Any, rows: Rows, jobs: Sequence[Job], translator: Translator, trace: RequestTrace
    ) -> None:
        self.trace = trace
        self._jobs, self._translator = jobs, translator
        self._request = request
        self._sender = request.get_response_sender()
        self._wanted = frozenset(request.requested_output_names())
        self._rows = rows

    def is_cancelled(self) -> bool:
        return bool(self._request.is_cancelled())

    def answer(self) -> None:
        by_row: list[Translated | None] = [None] * len(self._rows.errors)
        errors: dict[int, str] = {}
        for row, job in zip(self._rows.good, self._jobs):
            try:
                by_row[row] = self._translator.result(job)
            except NoNumberError as error:
                errors[row] = error.message
        try:
            self._rows.fail(errors)
        except RefusedError as refusal:
            send_last(self._sender, refusal.response())
            return
        outputs = [
            strings("TRANSLATION", [t.text if t else "" for t in by_row]),
            numbers("SCORE", [t.score if t else 0.0 for t in by_row], np.float32),
            numbers("SOURCE_TOKENS", [t.source_tokens if t else 0 for t in by_row], np.int32),
            numbers("TARGET_TOKENS", [t.target_tokens if t else 0 for t in by_row], np.int32),
            strings("FINISH", [t.finish if t else "" for t in by_row]),
            strings("ERROR", self._rows.errors),
        ]
        send_last(self._sender, pb_utils.InferenceResponse([o for o in outputs if o.name() in self._wanted]))

    def fail(self, error: Exception | None) -> None:
        send_failure(self._sender, error)


def _warmed_up(translator: Translator) -> Translator:
    """Run each kind of search once: the engine prepares kernels and memory at the first use of a shape."""
    task = translator.task
    for beams in (1, 2):
        few = override(task, {"num_beams": beams, "max_new_tokens": min(4, task.max_target_length - 1)})
        for rows in (1, max(translator.decoder.max_rows // 2, 1)):
            translator.translate(["a", *["a b c d"] * (rows - 1)], few)
    return translator


def _long_input(value: Any, where: str = "") -> LongInput:
    if value not in get_args(LongInput):
        raise UsageError(f"{where}{_LONG_INPUT} is {value!r}", f"give {' or '.join(get_args(LongInput))}")
    return cast(LongInput, value)


def _split(value: Any, where: str = "") -> Split:
    if value not in get_args(Split):
        raise UsageError(f"{where}{_SPLIT} is {value!r}", f"give {', '.join(get_args(Split))}")
    return cast(Split, value)


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
