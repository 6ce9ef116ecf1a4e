"""Random faults in requests to every route of a real server: the client's error, which names the field, and nothing worse.

``HYPOTHESIS_PROFILE=long`` sends 10,000 requests to each route, in place of 100; FUZZ_REQUESTS any number. FUZZ_SEED chooses another set of requests,
and a line for each route is added to the file FUZZ_RECORD.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from each_task import package_each_task
from mutated import Mutator, Request, Tensor
from served import start
from tiny_answerer import CONTEXT
from tritonclient.grpc import service_pb2_grpc

from deploykit.openai.app import create_app
from deploykit.openai.server import OpenAIServer
from deploykit.openai.triton_generator import TritonGenerator
from deploykit.openai.triton_routes import TritonRoutes
from deploykit.tasks.opening import open_served
from deploykit.tasks.text_generation.chat_template import CHATML
from deploykit.triton.preflight import listen

REQUESTS = int(os.environ.get("FUZZ_REQUESTS") or (10_000 if os.environ.get("HYPOTHESIS_PROFILE") == "long" else 100))
SEED = os.environ.get("FUZZ_SEED", "0")
CLIENTS = 4
TIMEOUT_S = 60

DIALOG = [{"role": "user", "content": "list the file"}]
TOOL = {
    "type": "function",
    "function": {"name": "ls", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}},
}
SAMPLING = {"max_tokens": 3, "temperature": 0.5, "seed": 1, "stop": ["x"], "logit_bias": {"7": 1.5}, "n": 1}
PORT_BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "lm", "messages": DIALOG, "top_p": 0.9, "stream": False, **SAMPLING},
    "/v1/chat/completions stream": {
        "model": "lm", "messages": [{"role": "system", "content": [{"type": "text", "text": "be short"}]}, *DIALOG], "stream": True,
        "temperature": 0, "stream_options": {"include_usage": True}, "logprobs": True, "top_logprobs": 2, "max_completion_tokens": 3,
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "integer"}}}},
    "/v1/chat/completions tools": {"model": "lm", "messages": DIALOG, "temperature": 0, "max_tokens": 3, "tools": [TOOL], "tool_choice": "auto"},
    "/v1/responses": {
        "model": "lm", "instructions": "be short", "input": [*DIALOG, {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "a"}]},
        {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "a"}]}], "max_output_tokens": 3, "temperature": 0,
        "top_logprobs": 2, "include": ["message.output_text.logprobs"], "text": {"format": {"type": "text"}}},
    "/v1/completions": {"model": "lm", "prompt": ["list", "the file"], "echo": True, "logprobs": 1, "best_of": 2, **SAMPLING},
    "/v1/classify": {"model": "tiny", "input": ["w1 w2", "w3"]},
    "/v1/translate": {"model": "fr", "input": ["Save the file."]},
    "/v1/answer": {"model": "qa", "input": [["w1 ?", CONTEXT]]},
}  # fmt: skip


def _tensor(name: str, values: list[Any], datatype: str = "BYTES", *rows: int) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": [*(rows or (len(values),))], "data": values}


TRITON_BODIES: dict[str, dict[str, Any]] = {
    "tiny/infer": {"inputs": [_tensor("TEXT", ["w1 w2", "w3"], "BYTES", 2, 1)], "id": "a",
                   "outputs": [{"name": "LABEL", "parameters": {"binary_data": False}}, {"name": "SCORES"}]},
    "fr/infer": {"inputs": [_tensor("TEXT", ["Save the file."], "BYTES", 1, 1)], "parameters": {"beam_size": 2, "max_new_tokens": 5}},
    "qa/infer": {"inputs": [_tensor("QUESTION", ["w1 ?"], "BYTES", 1, 1), _tensor("CONTEXT", [CONTEXT], "BYTES", 1, 1)],
                 "parameters": {"top_k": 2, "no_answer_threshold": "0.5"}},
    "lm/generate": {"text_input": "list the file", "stream": False, "sampling_parameters": json.dumps({"top_k": 3, "n": 2}),
                    "max_tokens": 3, "temperature": 0.5, "return_logprobs": True},
    "lm/generate_stream": {"messages": json.dumps(DIALOG), "stream": True, "parameters": {"max_tokens": 3, "seed": 2},
                           "return_num_output_tokens": True},
    "fr_stream/generate_stream": {"TEXT": "Save the file. Close it.", "max_new_tokens": 5},
    "fr/generate": {"TEXT": "Save the file.", "beam_size": 2},
}  # fmt: skip
WITH_TOOLS = "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}" + CHATML
EMBEDDED = {"lm/generate": "sampling_parameters", "lm/generate_stream": "messages"}
"""The input that has JSON in a text, which has faults of its own."""


@dataclass(frozen=True)
class Served:
    port: str
    http: str
    grpc: str


@pytest.fixture(scope="module")
def served(tiny_export: Path, tiny_translation: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("fuzzed")
    repository = package_each_task(folder, tiny_export, tiny_translation, template=WITH_TOOLS)
    with start(repository) as server:
        app = create_app(
            server.tasks, TritonGenerator(server.urls.grpc), lambda name: open_served(name, server.urls.http), created=1,
            triton=TritonRoutes(server.urls.http, server.models, ["lm"]),
        )  # fmt: skip
        with OpenAIServer(app, listen("openai", "127.0.0.1", 0), drain=5.0) as port:
            yield Served(
                port.url.removeprefix("http://").removesuffix("/v1"),
                server.urls.http.removeprefix("http://"),
                server.urls.grpc,
            )


class Client:
    """A client of HTTP with a connection that is kept."""

    def __init__(self, address: str) -> None:
        self._connection = http.client.HTTPConnection(address, timeout=TIMEOUT_S)

    def ask(self, route: str, body: bytes, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
        self._connection.request("POST", route, body, {"Content-Type": "application/json", **(headers or {})})
        answer = self._connection.getresponse()
        return answer.status, answer.read()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()


def fuzz(
    route: str,
    open_client: Callable[[], Any],
    ask: Callable[[Any, Mutator], tuple[Any, Answer]],
    ask_valid: Callable[[Any], Any],
) -> None:
    """Send REQUESTS requests by several clients. ``ask`` returns what it sent and the answer.

    Meanwhile each asks now and then for a valid answer by ``ask_valid``, which must be the same each time.
    """

    def some(number: int) -> list[tuple[Any, Answer]]:
        mutator = Mutator(f"{route} {number} {SEED}")
        with open_client() as client:
            expected = ask_valid(client)
            found = []
            for count in range(REQUESTS // CLIENTS):
                found.append(ask(client, mutator))
                if count % 10 == 0:
                    assert (answer := ask_valid(client)) == expected, f"a valid request was answered: {answer}"
            return found

    with ThreadPoolExecutor(CLIENTS) as pool:
        asked = [each for found in pool.map(some, range(CLIENTS)) for each in found]
    bad = {found.told: (sent, found) for sent, found in asked if found.fault}
    assert not bad, f"{len(bad)} kinds of faults: {list(bad.values())[:5]}"
    refused = Counter(found.told for _, found in asked)
    if record := os.environ.get("FUZZ_RECORD"):
        with open(record, "a") as file:
            counts = {"route": route, "requests": len(asked), "answered": refused[""], "errors": len(refused)}
            file.write(json.dumps(counts) + "\n")
    assert len(refused) > 3, "the faults are too much alike"


@dataclass(frozen=True)
class Answer:
    """``told``: the error, "" for none. ``fault``: what is wrong with the answer."""

    told: str
    fault: str


def events_of(answer: bytes) -> list[Any]:
    """Return the objects of an answer, which is a stream of events or one object."""
    text = answer.decode(errors="replace")  # an error may quote what was no UTF-8
    texts = [event.removeprefix("data: ") for event in text.split("\n\n")] if text.startswith("data: ") else [text]
    try:
        return [json.loads(each) for each in texts if each not in ("", "[DONE]")]
    except ValueError as fault:
        raise AssertionError(answer[:3000]) from fault


def of_port(status: int, answer: bytes) -> Answer:
    error = next((event["error"] for event in events_of(answer) if "error" in event), None)
    if error is None:
        return Answer("", "" if status == 200 else f"{status}")
    told = f"{error['param']}: {error['message']}"
    if status not in (200, 400, 404) or error["type"] != "invalid_request_error":
        return Answer(told, f"{status}: {error}")
    no_object = re.match("the body (is not|must be)", error["message"])
    return Answer(told, "" if error["param"] or no_object else "no field is named")


def of_triton(status: int, answer: bytes) -> Answer:
    if status == 200 and not answer.startswith(b"data: "):
        return Answer("", "")  # its outputs may be binary
    told = next((event["error"] for event in events_of(answer) if "error" in event), "")
    if status not in (200, 400, 404) or (status != 200 and not told):
        return Answer(told, f"{status}: {told}")
    return Answer(told, fault_of(told))


NAMED = re.compile(
    r"'.*'|value type for|JSON|parameter|row \d|shape|version|input|header size|\b(is|has|names|holds|exclude|go|differs|cannot) |give one of"
)
"""A name in quotes, or before a verb as in "top_k is -1"; or what else is wrong with the body."""


def fault_of(told: str) -> str:
    if not told or (NAMED.search(told) and "the model failed" not in told):
        return ""
    return "no field is named"


def whole(answer: tuple[int, bytes]) -> Any:
    """Return an answer to compare: of a stream the joined texts, since its pieces come as it happens."""
    status, content = answer
    if not content.startswith(b"data: "):
        return status, re.sub(rb'"(id|item_id|created|created_at)": ?("[^"]*"|\d+)', b"", content)
    texts = []
    for event in events_of(content):
        texts += [choice["delta"].get("content") or "" for choice in event.get("choices", ())]
        texts.append(event.get("text_output") or event.get("TRANSLATION") or "")
    return status, "".join(texts)


@pytest.mark.parametrize("route", PORT_BODIES)
def test_the_openai_port(served: Served, route: str) -> None:
    path, valid = route.split()[0], PORT_BODIES[route]

    def ask(client: Client, mutator: Mutator) -> tuple[bytes, Answer]:
        sent = mutator.body(valid)
        return sent, of_port(*client.ask(path, sent))

    def ask_valid(client: Client) -> Any:
        return whole(client.ask(path, json.dumps(valid).encode()))

    with Client(served.port) as client:
        before = client.ask(path, json.dumps(valid).encode())
        assert before[0] == 200, before
        fuzz(route, lambda: Client(served.port), ask, ask_valid)
        assert ask_valid(client) == whole(before)


@pytest.mark.parametrize("by", ["http", "port"])
@pytest.mark.parametrize("route", TRITON_BODIES)
def test_tritons_routes(served: Served, route: str, by: str) -> None:
    path, valid, address = f"/v2/models/{route}", TRITON_BODIES[route], getattr(served, by)
    name = EMBEDDED.get(route, "")

    def ask(client: Client, mutator: Mutator) -> tuple[bytes, Answer]:
        if name and mutator.chance(0.5):
            inner = mutator.body(json.loads(valid[name])).decode(errors="surrogateescape")
            sent = json.dumps({**valid, name: inner}).encode()
        else:
            sent = mutator.body(valid)
        return sent, of_triton(*client.ask(path, sent))

    def ask_valid(client: Client) -> Any:
        return whole(client.ask(path, json.dumps(valid).encode()))

    with Client(address) as client:
        before = client.ask(path, json.dumps(valid).encode())
        assert before[0] == 200, before
        fuzz(f"{route} {by}", lambda: Client(address), ask, ask_valid)
        assert ask_valid(client) == whole(before)


BINARY = b"\x05\0\0\0w1 w2\x02\0\0\0w3"


@pytest.mark.parametrize("by", ["http", "port"])
def test_binary_tensors(served: Served, by: str) -> None:
    path, valid, address = "/v2/models/tiny/infer", TRITON_BODIES["tiny/infer"], getattr(served, by)

    def ask(client: Client, mutator: Mutator) -> tuple[Any, Answer]:
        sent, length = mutator.binary(valid, BINARY)
        return (sent, length), of_triton(*client.ask(path, sent, {"Inference-Header-Content-Length": length}))

    def ask_valid(client: Client) -> Any:
        return whole(client.ask(path, json.dumps(valid).encode()))

    with Client(address) as client:
        before = client.ask(path, json.dumps(valid).encode())
        fuzz(f"binary {by}", lambda: Client(address), ask, ask_valid)
        assert ask_valid(client) == whole(before)


def _message(model: str, tensors: dict[str, tuple[str, list[int], bytes]], **parameters: int) -> Request:
    inputs = [Tensor(name=name, datatype=kind, shape=shape) for name, (kind, shape, _) in tensors.items()]
    found = Request(model_name=model, inputs=inputs, raw_input_contents=[raw for _, _, raw in tensors.values()])
    for name, value in parameters.items():
        found.parameters[name].int64_param = value
    return found


def _text(*texts: str) -> bytes:
    return b"".join(struct.pack("<I", len(text.encode())) + text.encode() for text in texts)


MESSAGES = {
    "tiny": _message("tiny", {"TEXT": ("BYTES", [2, 1], BINARY)}),
    "fr": _message("fr", {"TEXT": ("BYTES", [1, 1], _text("Save the file."))}, beam_size=2, max_new_tokens=5),
    "qa": _message("qa", {"QUESTION": ("BYTES", [1, 1], _text("w1 ?")), "CONTEXT": ("BYTES", [1, 1], _text(CONTEXT))}, top_k=2),
    "fr_stream": _message("fr_stream", {"TEXT": ("BYTES", [1], _text("Save the file. Close it."))}, max_new_tokens=5),
    "lm": _message("lm", {"text_input": ("BYTES", [1], _text("list the file")), "stream": ("BOOL", [1], b"\1"),
                          "sampling_parameters": ("BYTES", [1], _text('{"seed": 1}'))}, max_tokens=3),
    "lm ids": _message("lm", {"input_ids": ("INT64", [3], struct.pack("<3q", 7, 8, 9)), "return_logprobs": ("BOOL", [1], b"\1")}, max_tokens=3),
}  # fmt: skip
CLIENTS_FAULTS = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)


def ask_grpc(channel: Any, message: Request, *, stream: bool, codes: bool) -> tuple[bytes, Answer]:
    """Return the joined first outputs of the answers to a message, and how it ended. ``codes``: ask for error codes."""
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
    found, told = b"", ""
    try:
        if stream:
            metadata = [("triton_grpc_error", "true")] if codes else []
            for answer in stub.ModelStreamInfer(iter([message]), timeout=TIMEOUT_S, metadata=metadata):
                told = told or answer.error_message
                found += b"".join(raw[4:] for raw in answer.infer_response.raw_output_contents[:1])
        else:
            found = b"".join(stub.ModelInfer(message, timeout=TIMEOUT_S).raw_output_contents)
    except grpc.RpcError as error:
        told = error.details()
        if error.code() not in CLIENTS_FAULTS:
            return found, Answer(told, f"{error.code()}: {told}")
    return found, Answer(told, fault_of(told))


@pytest.mark.parametrize("stream", [False, True], ids=["one", "stream"])
@pytest.mark.parametrize("name", MESSAGES)
def test_grpc(served: Served, name: str, stream: bool) -> None:
    valid = MESSAGES[name]
    if not stream and valid.model_name in ("fr_stream", "lm"):
        pytest.skip("Triton answers decoupled models only in streams")

    def ask(channel: Any, mutator: Mutator) -> tuple[Request, Answer]:
        sent = mutator.message(valid)
        return sent, ask_grpc(channel, sent, stream=stream, codes=mutator.chance(0.5))[1]

    def ask_valid(channel: Any) -> Any:
        return ask_grpc(channel, valid, stream=stream, codes=True)

    with grpc.insecure_channel(served.grpc) as channel:
        before = ask_valid(channel)
        assert before[1] == Answer("", "")
        fuzz(f"grpc {name} {stream}", lambda: grpc.insecure_channel(served.grpc), ask, ask_valid)
        assert ask_valid(channel) == before
