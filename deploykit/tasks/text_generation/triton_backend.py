"""Serve a language model in Triton: requests join the running batch, and answers are sent whole or streamed.

The names of inputs and outputs are those of Triton's vLLM backend. Pieces are sent from a separate thread: the pieces of a
slow client become longer, and no other request waits for it. A piece costs Triton, the OpenAI port and the client about
1 ms of CPU time (measured), which the engine lacks where they share its cores. So pieces have a rate limit.

Source: Triton vLLM backend README; Triton Python backend README, "Decoupled mode".
"""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from deploykit.artifacts import Manifest
from deploykit.errors import DeploykitError
from deploykit.runtime.decode_loop import DecodeLoop
from deploykit.runtime.engines.causal_lm import MAX_CACHE_BYTES, MAX_ROWS
from deploykit.runtime.find_graphs import find_graphs
from deploykit.runtime.sampling import Sampling, override
from deploykit.runtime.triton_decoding import LoadMetrics, RequestTrace, log_error, send_failure, send_last, submit
from deploykit.runtime.triton_requests import (
    FailedError,
    RefusedError,
    cpu_threads,
    number_parameter,
    parameters_of,
)
from deploykit.tasks.text_generation.decoder import Answer, Query
from deploykit.tasks.text_generation.encode import ChatTokenizer
from deploykit.tasks.text_generation.facts import TextGeneration
from deploykit.tasks.text_generation.generator import LocalGenerator
from deploykit.tasks.text_generation.logprobs import TokenLogprob
from deploykit.tasks.text_generation.messages import checked_messages, checked_tools
from deploykit.tasks.text_generation.predictor import load_generator
from deploykit.text import MAX_TEXT_CHARS

_CHECKS = 8
"""Requests that are checked for cancellation every 5 ms: all rows within a step or two."""
_PIECES_PER_S = 125
"""Most pieces per second of all streams together, within these limits of the time between two pieces of one stream."""
_SHORTEST_GAP_S = 0.03
_LONGEST_GAP_S = 0.1
_WARM_UP_TOKENS = 4
_NOTHING = (0, 0, False)
_MOST_LEVELS = 64
"""Deepest nesting of lists and objects in JSON: what reads them goes deeper with each level."""


def _optional(name: str, kind: str, size: int = 1) -> Mapping[str, Any]:
    return {"name": name, "data_type": kind, "dims": [size], "optional": True}


class TextGenerationBackend:
    inputs: Sequence[Mapping[str, Any]] = (
        _optional("text_input", "TYPE_STRING"),
        _optional("input_ids", "TYPE_INT64", -1),
        _optional("messages", "TYPE_STRING"),
        _optional("stream", "TYPE_BOOL"),
        _optional("sampling_parameters", "TYPE_STRING"),
        _optional("exclude_input_in_output", "TYPE_BOOL"),
        _optional("return_finish_reason", "TYPE_BOOL"),
        _optional("return_cumulative_logprob", "TYPE_BOOL"),
        _optional("return_logprobs", "TYPE_BOOL"),
        _optional("return_num_input_tokens", "TYPE_BOOL"),
        _optional("return_num_output_tokens", "TYPE_BOOL"),
    )
    outputs: Sequence[Mapping[str, Any]] = (
        {"name": "text_output", "data_type": "TYPE_STRING", "dims": [-1]},
        {"name": "finish_reason", "data_type": "TYPE_STRING", "dims": [-1]},
        {"name": "cumulative_logprob", "data_type": "TYPE_FP32", "dims": [-1]},
        {"name": "logprobs", "data_type": "TYPE_STRING", "dims": [-1]},
        {"name": "num_input_tokens", "data_type": "TYPE_UINT32", "dims": [1]},
        {"name": "num_output_tokens", "data_type": "TYPE_UINT32", "dims": [-1]},
    )

    def __init__(self, config: Mapping[str, Any], folder: Path, manifest: Manifest, device: int) -> None:
        task = manifest.task
        assert isinstance(task, TextGeneration)
        max_rows = number_parameter(config, "max_rows", MAX_ROWS)
        max_cache_mb = number_parameter(config, "max_cache_mb", MAX_CACHE_BYTES >> 20)
        if not max_rows or not max_cache_mb:
            raise DeploykitError("config.pbtxt: parameters max_rows and max_cache_mb are 1 or more", "correct them")
        graphs = find_graphs(folder, manifest, engine="auto", precision="auto")
        load = partial(
            load_generator,
            folder,
            task,
            graphs.engine,
            graphs.files[0],
            cpu_threads(config),
            max_rows=max_rows,
            max_cache_bytes=max_cache_mb << 20,
        )
        max_queue = number_parameter(config, "max_queue", 1024)
        # Compiling a grammar may take a second, and only requests with one should wait for it.
        self._compiling = ThreadPoolExecutor(1, "grammars")
        self._uncompiled = threading.BoundedSemaphore(max(max_queue, 1))
        self._loop: DecodeLoop[LocalGenerator] = DecodeLoop(
            lambda: _warmed_up(load()),
            max_queue=max_queue,
            checks=_CHECKS,
            report=LoadMetrics(config).report,
            log_error=log_error,
            trace=lambda client, stages: client.trace.add(stages),
        )

    def execute(self, requests: Sequence[Any]) -> None:
        """Submit the requests to the decode loop, which answers them later."""
        for request in requests:
            sender = request.get_response_sender()
            self._try(sender, partial(self._submit, request, sender))

    def close(self) -> None:
        self._compiling.shutdown()
        self._loop.close()

    def _try(self, sender: Any, work: Callable[[], None]) -> None:
        """Submit a request, or answer with the error that prevents it."""
        try:
            work()
        except RefusedError as refusal:
            send_last(sender, refusal.response())
        except DeploykitError as refused:
            send_last(sender, RefusedError(f"{refused.message}: {refused.remedy}").response())
        except Exception as error:
            log_error(error)
            send_last(sender, FailedError(error).response())

    def _submit(self, request: Any, sender: Any) -> None:
        trace = RequestTrace(request)
        generator = self._loop.model
        asked = _Asked(request)
        sampling = asked.sampling(generator.task)
        prompt = asked.prompt_ids(generator.tokenizer, generator.task)
        client = _Client(request, sender, asked, generator.tokenizer, self._loop, trace)

        def join() -> None:
            query = client.query = generator.query(
                prompt, sampling, on_tokens=client.tell, prompt_logprobs=asked.prompt_logprobs
            )
            submit(self._loop, client, [query])

        if sampling.structure is None:
            join()
        elif self._uncompiled.acquire(blocking=False):
            self._compiling.submit(self._compile, client, sender, join)
        else:
            raise RefusedError("the queue is full", pb_utils.TritonError.UNAVAILABLE)

    def _compile(self, client: _Client, sender: Any, join: Callable[[], None]) -> None:
        self._uncompiled.release()
        if client.is_cancelled():
            send_failure(sender, None)
        else:
            self._try(sender, join)


class _Asked:
    """The inputs of a request."""

    def __init__(self, request: Any) -> None:
        self._request = request
        self.text = self._text("text_input")
        self._ids = self._int_list("input_ids")
        self._messages = self._json("messages")
        if [self.text, self._ids, self._messages].count(None) != 2:
            raise RefusedError("give one of text_input, input_ids and messages")
        given = self._json("sampling_parameters")
        given = {} if given is None else given
        if not isinstance(given, dict):
            raise RefusedError("sampling_parameters is not a JSON object")
        given = {**parameters_of(request), **given}
        self.echo = self._given_flag(given, "echo")
        self._given = given
        self.stream = self._flag("stream")
        excluded = self._flag("exclude_input_in_output") or self.stream
        self.with_input = self._messages is None and (self.echo or not excluded)
        self.wanted = frozenset(
            name
            for name in ("finish_reason", "cumulative_logprob", "logprobs", "num_input_tokens", "num_output_tokens")
            if self._flag(f"return_{name}")
        )

    @property
    def prompt_logprobs(self) -> bool:
        return self.echo and "logprobs" in self.wanted

    def sampling(self, task: TextGeneration) -> Sampling:
        """Return the sampling options. Raises UsageError naming the first that is unknown or out of range."""
        given = dict(self._given)
        if self.wanted & {"logprobs", "cumulative_logprob"}:
            given.setdefault("logprobs", 0)
        # A client that wants only the prompt, or its log-probabilities, asks for no tokens.
        scored_only = self.echo and given.get("max_new_tokens") == 0
        if scored_only:
            del given["max_new_tokens"]
        found = override(task.sampling, given)
        return dataclasses.replace(found, max_new_tokens=0, min_new_tokens=0) if scored_only else found

    def prompt_ids(self, tokenizer: ChatTokenizer, task: TextGeneration) -> list[int]:
        if self._ids is not None:
            for place, token in enumerate(self._ids):
                if not 0 <= token < task.vocabulary:
                    raise RefusedError(f"input_ids[{place}] is {token}, and the model has {task.vocabulary:,} tokens")
            return self._ids
        if self.text is not None:
            return tokenizer.encode_prompt(self.text)
        if tokenizer.template is None:
            raise RefusedError(
                "messages cannot be read: the model has no chat template; give a text to continue, "
                "as text_input or at /v1/completions"
            )
        dialog = self._messages if isinstance(self._messages, dict) else {"messages": self._messages}
        return tokenizer.encode_prompt(
            checked_messages(dialog.get("messages")), tools=checked_tools(dialog.get("tools"))
        )

    def _text(self, name: str) -> str | None:
        tensor = pb_utils.get_input_tensor_by_name(self._request, name)
        if tensor is None:
            return None
        value = tensor.as_numpy().reshape(-1)[0]
        try:
            text = str(value.decode())
        except UnicodeDecodeError as fault:
            raise RefusedError(
                f"{name} is not UTF-8: byte {value[fault.start]:#04x} at position {fault.start}"
            ) from None
        if len(text) > MAX_TEXT_CHARS:
            raise RefusedError(f"{name} has {len(text):,} characters, the maximum is {MAX_TEXT_CHARS:,}")
        return text

    def _int_list(self, name: str) -> list[int] | None:
        tensor = pb_utils.get_input_tensor_by_name(self._request, name)
        return None if tensor is None else [int(value) for value in tensor.as_numpy().reshape(-1)]

    def _json(self, name: str) -> Any:
        text = self._text(name)
        if not text:
            return None
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RefusedError(f"{name} is not JSON: {error}") from None
        if _levels_exceed(value, _MOST_LEVELS):
            raise RefusedError(f"{name} is nested more than {_MOST_LEVELS} levels deep")
        return value

    def _flag(self, name: str) -> bool:
        tensor = pb_utils.get_input_tensor_by_name(self._request, name)
        return tensor is not None and bool(tensor.as_numpy().reshape(-1)[0])

    def _given_flag(self, given: dict[str, Any], name: str) -> bool:
        value = given.pop(name, False)
        if not isinstance(value, bool):
            raise RefusedError(f"{name} is {value!r}: give true or false")
        return value


class _Client:
    """The client of one request. ``tell`` is called in the loop's thread, all else in the clients' thread."""

    query: Query

    def __init__(
        self,
        request: Any,
        sender: Any,
        asked: _Asked,
        tokenizer: ChatTokenizer,
        loop: DecodeLoop[LocalGenerator],
        trace: RequestTrace,
    ) -> None:
        self.trace = trace
        self._request, self._sender, self._asked, self._tokenizer, self._loop = request, sender, asked, tokenizer, loop
        self._told = False  # whether a call of ``_send_piece`` is on its way
        self._next_piece = 0.0  # the earliest time of the next one
        self._sent: dict[int, tuple[int, int, bool]] = {}  # by answer: characters, tokens, and whether its end was sent
        self._ended = False

    def is_cancelled(self) -> bool:
        return bool(self._request.is_cancelled())

    def tell(self, query: Query) -> None:
        """Schedule sending the new text, if the answer is streamed and the last piece was not sent just now."""
        if self._asked.stream and not self._told and time.monotonic() >= self._next_piece:
            self._told = True
            self._loop.call_in_client_thread(self._send_piece)

    def answer(self) -> None:
        if (error := self.query.error) is not None:
            send_last(self._sender, RefusedError(f"{error.message}: {error.remedy}").response())
        elif self._asked.stream:
            self._send_piece()
            send_last(self._sender)
        else:
            send_last(self._sender, self._response())

    def fail(self, error: Exception | None) -> None:
        self._ended = True
        send_failure(self._sender, error)

    def _send_piece(self) -> None:
        if self._ended or not any(self._is_new(*numbered) for numbered in enumerate(self._answers())):
            self._told = False
            return
        gap = len(self._loop.model.decoder.running) / _PIECES_PER_S
        self._next_piece = time.monotonic() + min(max(gap, _SHORTEST_GAP_S), _LONGEST_GAP_S)
        self._told = False
        self._ended = self.query.done
        response = self._response()
        if self.query.error is None:  # ``answer`` sends it, and the answers have no end
            self._sender.send(response)

    def _answers(self) -> list[Answer]:
        """Return the answers to send: those of ``best_of`` are known when all are done."""
        query = self.query
        if query.sampling.candidates > query.sampling.n and not query.done:
            return []
        return list(query.kept())

    def _is_new(self, number: int, answer: Answer) -> bool:
        text, tokens, ended = self._sent.get(number, _NOTHING)
        more_tokens = "logprobs" in self._asked.wanted and len(answer.ids) > tokens
        return len(answer.text) > text or more_tokens or (answer.finish is not None and not ended)

    def _response(self) -> Any:
        """Return the new part of each answer. The loop's thread may append to them at the same time."""
        texts, finishes, logprobs, sums, counts = [], [], [], [], []
        for number, answer in enumerate(self._answers()):
            first = number not in self._sent
            sent_text, sent_tokens, ended = self._sent.get(number, _NOTHING)
            # In this order: an answer that has its end has all of its text.
            finish = answer.finish
            tokens, text = len(answer.ids), answer.text
            self._sent[number] = len(text), tokens, finish is not None
            texts.append((self._input_text() if first and self._asked.with_input else "") + text[sent_text:])
            finishes.append("" if ended or finish is None else "length" if finish == "length" else "stop")
            new = answer.logprobs[sent_tokens:tokens]
            logprobs.append(self._logprobs(new, with_prompt=first and self._asked.prompt_logprobs))
            sums.append(answer.total_logprob)
            counts.append(tokens - sent_tokens)
        tensors = {
            "text_output": _strings(texts),
            "finish_reason": _strings(finishes),
            "cumulative_logprob": np.array(sums, np.float32),
            "logprobs": _strings(logprobs) if "logprobs" in self._asked.wanted else None,
            "num_input_tokens": np.array([len(self.query.prompt)], np.uint32),
            "num_output_tokens": np.array(counts, np.uint32),
        }
        return pb_utils.InferenceResponse(
            [
                pb_utils.Tensor(name, value)
                for name, value in tensors.items()
                if name == "text_output" or name in self._asked.wanted
            ]
        )

    def _input_text(self) -> str:
        """Return the prompt, special tokens included."""
        if self._asked.text is not None:
            return self._asked.text
        return str(self._tokenizer.tokenizer.decode(list(self.query.prompt), skip_special_tokens=False))

    def _logprobs(self, of_answer: Sequence[TokenLogprob], *, with_prompt: bool) -> str:
        records = [found.record(self._tokenizer) for found in of_answer]
        if with_prompt:
            first = TokenLogprob(self.query.prompt[0], 0.0).record(self._tokenizer) | {"logprob": None}
            records = [first, *(found.record(self._tokenizer) for found in self.query.of_prompt), *records]
        return json.dumps(records, ensure_ascii=False)


def _levels_exceed(value: Any, most: int) -> bool:
    level = [value]
    for _ in range(most + 1):
        level = [one for one in level if isinstance(one, dict | list)]
        if not level:
            return False
        level = [item for one in level for item in (one.values() if isinstance(one, dict) else one)]
    return True


def _strings(values: Sequence[str]) -> Any:
    return np.array([value.encode() for value in values], np.object_)


def _warmed_up(generator: LocalGenerator) -> LocalGenerator:
    """Generate a little: the engine prepares kernels and memory at the first use of a shape."""
    some = Sampling(max_new_tokens=min(_WARM_UP_TOKENS, generator.task.max_length - 1))
    prompt = [generator.task.eos_token_ids[0]]
    for rows in {1, min(2, generator.model.max_rows)}:
        generator.generate([prompt] * rows, some)
    return generator
