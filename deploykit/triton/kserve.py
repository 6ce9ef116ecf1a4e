"""Serve a model in this process over HTTP with Triton's API, for a device without Triton.

Clients of Triton's HTTP API work unchanged: tensors as JSON or in Triton's binary extension, the same names, errors and
status codes. It takes texts and returns any tensor. It has no shared memory, no compression and no gRPC. A web framework
would be one more wheel in every bundle, for four routes.

Source: KServe Open Inference Protocol v2, REST; Triton's "Binary Tensor Data Extension".
"""

from __future__ import annotations

import json
import re
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from numpy.typing import NDArray

import deploykit
from deploykit.errors import RequestError, ServerError
from deploykit.triton.in_process import InferenceRequest, InferenceResponse, InProcessModel, TritonError

MAX_BODY_BYTES = 64 << 20
_IDLE_S = 60.0
_DRAIN_S = 10.0
_BINARY_HEADER = "Inference-Header-Content-Length"
_PATH = re.compile(r"/v2/models/(?P<model>[^/]+)(?:/versions/(?P<version>[^/]+))?(?P<what>/config|/ready|/infer)?")
_STATUS = {TritonError.INVALID_ARG: 400, TritonError.NOT_FOUND: 404, TritonError.UNAVAILABLE: 503}
_DATATYPES = {"TYPE_STRING": "BYTES", "TYPE_FP32": "FP32", "TYPE_INT32": "INT32"}
_OF_SERVER = {"binary_data_output", "sequence_id", "sequence_start", "sequence_end", "priority", "timeout"}
"""Request parameters that Triton does not pass to a model."""
_OF_ARRAYS = {"O": "BYTES", "f": "FP32", "i": "INT32"}  # numpy dtype kind -> Triton data type


@dataclass(frozen=True)
class Answer:
    """An HTTP response. ``header_length`` is the size of the JSON before binary tensors; None where there are none."""

    status: int
    body: bytes = b""
    header_length: int | None = None


class _Bad(RequestError):
    """Raised for a malformed request: HTTP 400, or ``status``."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message, status)


def answer(model: InProcessModel, method: str, path: str, body: bytes, header_length: int | None) -> Answer:
    """Return the response to one request. ``header_length`` is the value of the request's header of that name."""
    try:
        return _answer(model, method, path, body, header_length)
    except _Bad as bad:
        return _json({"error": str(bad)}, bad.status)


def _answer(model: InProcessModel, method: str, path: str, body: bytes, header_length: int | None) -> Answer:
    path = path.partition("?")[0].rstrip("/")
    if path in ("/v2/health/live", "/v2/health/ready"):
        return Answer(200)
    if path == "/v2":
        return _json({"name": "deploykit", "version": deploykit.__version__, "extensions": ["binary_tensor_data"]})
    found = _PATH.fullmatch(path)
    if found is None:
        raise _Bad(f"{path}: not found", 404)
    if found["model"] != model.name or found["version"] not in (None, model.version):
        raise _Bad(f"Request for unknown model: '{found['model']}' is not found", 404)
    if (found["what"] == "/infer") != (method == "POST"):
        raise _Bad(f"{path} does not accept {method}", 405)
    if found["what"] == "/config":
        return _json(model.config)
    if found["what"] == "/ready":
        return Answer(200)
    if found["what"] is None:
        return _json(_metadata(model))
    request = _read_request(body, header_length)
    texts = _texts(request, body, header_length, model)
    wanted = _requested_outputs(request, model)
    parameters = {name: value for name, value in _parameters(request).items() if name not in _OF_SERVER}
    response = model.infer(InferenceRequest(texts, list(wanted), parameters))
    if (error := response.error()) is not None:
        raise _Bad(error.message(), _STATUS.get(error.code(), 500))
    return _write_response(model, request.get("id"), response, wanted)


def _metadata(model: InProcessModel) -> dict[str, Any]:
    def tensors(kind: str) -> list[dict[str, Any]]:
        return [
            {"name": t["name"], "datatype": _DATATYPES[t["data_type"]], "shape": [-1, *map(int, t["dims"])]}
            for t in model.config[kind]
        ]

    return {"name": model.name, "versions": [model.version], "platform": "deploykit",
            "inputs": tensors("input"), "outputs": tensors("output")}  # fmt: skip


def _read_request(body: bytes, header_length: int | None) -> dict[str, Any]:
    try:
        request = json.loads(body[:header_length])
    except (ValueError, RecursionError) as error:
        raise _Bad(f"failed to parse the request JSON buffer: {error}") from None
    if not isinstance(request, dict) or not isinstance(request.get("inputs"), list):
        raise _Bad("the request has no list of inputs")
    if not all(isinstance(t, dict) for t in (*request["inputs"], *_outputs(request))):
        raise _Bad("inputs and outputs must be lists of objects")
    return request


def _outputs(request: Mapping[str, Any]) -> list[Any]:
    outputs = request.get("outputs") or []
    if not isinstance(outputs, list):
        raise _Bad("outputs must be a list")
    return outputs


def _parameters(tensor: Mapping[str, Any]) -> dict[str, Any]:
    parameters = tensor.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise _Bad("parameters must be an object")
    return parameters


def _texts(
    request: Mapping[str, Any], body: bytes, header_length: int | None, model: InProcessModel
) -> dict[str, NDArray[Any]]:
    """Return the texts of each input, all of one length. Binary ones follow the JSON in the request's order."""
    names = [tensor["name"] for tensor in model.config["input"]]
    given = [t.get("name") for t in request["inputs"]]
    if sorted(map(str, given)) != sorted(names):
        raise _Bad(f"expected {len(names)} input{'s' * (len(names) > 1)}, {', '.join(names)}, but got {given}")
    binary = memoryview(body)[len(body) if header_length is None else header_length :]
    found = {}
    for tensor in request["inputs"]:
        found[tensor["name"]], binary = _input(tensor, binary, model.max_batch_size)
    if len(binary):
        raise _Bad(f"{len(binary)} bytes of binary data follow the inputs")
    if len({len(texts) for texts in found.values()}) > 1:
        raise _Bad(f"the inputs {', '.join(names)} have unlike numbers of rows")
    return found


def _input(tensor: Mapping[str, Any], binary: memoryview, most: int) -> tuple[NDArray[Any], memoryview]:
    """Return one input's texts, object [rows, 1] of bytes, and the rest of the binary data."""
    name = tensor["name"]
    if tensor.get("datatype") != "BYTES":
        raise _Bad(f"input {name} must be BYTES, not {tensor.get('datatype')}")
    size = _parameters(tensor).get("binary_data_size")
    if size is None:
        values = [_encoded(name, value) for value in _flat(name, tensor.get("data"))]
    elif isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= len(binary):
        raise _Bad(f"input {name} has {len(binary)} bytes of binary data, not {size}")
    else:
        values, binary = list(_unpack(name, binary[:size])), binary[size:]
    if tensor.get("shape") != [len(values), 1]:
        raise _Bad(f"input {name} has the shape {tensor.get('shape')}, but {len(values)} elements: give [rows, 1]")
    if len(values) > most:
        raise _Bad(f"inference request batch-size must be <= {most}, not {len(values)}")
    return np.array(values, np.object_).reshape(-1, 1), binary


def _flat(name: str, data: Any) -> Iterator[Any]:
    """Return JSON's nested lists flattened in row-major order."""
    if not isinstance(data, list):
        raise _Bad(f"input {name} has no list of data")
    for value in data:
        if isinstance(value, list):
            yield from _flat(name, value)
        else:
            yield value


def _encoded(name: str, value: Any) -> bytes:
    if not isinstance(value, str):
        raise _Bad(f"input {name} holds {json.dumps(value)[:50]}, which is not a string")
    return value.encode("utf-8", "surrogatepass")


def _unpack(name: str, data: memoryview) -> Iterator[bytes]:
    """Yield BYTES elements: each has a length, 4 bytes little-endian, then its bytes."""
    position = 0
    while position < len(data):
        if position + 4 > len(data):
            raise _Bad(f"input {name}: the binary data end inside a length")
        (length,) = struct.unpack_from("<I", data, position)
        position += 4 + length
        if position > len(data):
            raise _Bad(f"input {name}: the binary data end inside an element")
        yield bytes(data[position - length : position])


def _requested_outputs(request: Mapping[str, Any], model: InProcessModel) -> dict[str, bool]:
    """Return the names of the requested outputs (none: all), and for each whether it is requested in binary."""
    known = [output["name"] for output in model.config["output"]]
    everywhere = bool(_parameters(request).get("binary_data_output", False))
    outputs = _outputs(request)
    for output in outputs:
        if output.get("name") not in known:
            raise _Bad(f"unexpected inference output '{output.get('name')}' for model '{model.name}'")
    if not outputs:
        return dict.fromkeys(known, everywhere)
    return {output["name"]: bool(_parameters(output).get("binary_data", everywhere)) for output in outputs}


def _write_response(
    model: InProcessModel, request_id: Any, response: InferenceResponse, wanted: Mapping[str, bool]
) -> Answer:
    head: dict[str, Any] = {"model_name": model.name, "model_version": model.version, "outputs": []}
    if request_id is not None:
        head["id"] = request_id
    blobs = []
    for tensor in response.output_tensors():
        array = tensor.as_numpy()
        datatype = _OF_ARRAYS[array.dtype.kind]
        text = datatype == "BYTES"
        output: dict[str, Any] = {"name": tensor.name(), "datatype": datatype, "shape": list(array.shape)}
        if wanted[tensor.name()]:
            little = array.dtype.newbyteorder("<")
            blobs.append(_pack(array.reshape(-1)) if text else np.ascontiguousarray(array, little).tobytes())
            output["parameters"] = {"binary_data_size": len(blobs[-1])}
        else:
            output["data"] = [v.decode() if text else v for v in array.reshape(-1).tolist()]
        head["outputs"].append(output)
    body = json.dumps(head, ensure_ascii=False).encode()
    return Answer(200, body + b"".join(blobs), len(body) if blobs else None)


def _pack(values: Sequence[bytes] | NDArray[Any]) -> bytes:
    return b"".join(struct.pack("<I", len(value)) + value for value in values)


def _json(content: Mapping[str, Any], status: int = 200) -> Answer:
    return Answer(status, json.dumps(content, ensure_ascii=False).encode())


class KServeServer:
    """Serves ``model`` at http://``host``:``port`` while the block runs; port 0 takes a free one. Raises
    ServerError."""

    def __init__(self, model: InProcessModel, host: str, port: int) -> None:
        self._handling = _Handling()
        handler = type("Handler", (_Handler,), {"model": model, "handling": self._handling, "timeout": _IDLE_S})
        try:
            self._server = ThreadingHTTPServer((host, port), handler)
        except (OSError, OverflowError) as error:
            raise ServerError(
                f"HTTP port {port} on {host}: {getattr(error, 'strerror', None) or error}",
                "choose another with --port (0 takes a free one)",
            ) from None
        self.url = f"http://{host}:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, name="deploykit-http", daemon=True)

    def __enter__(self) -> KServeServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Accept no more connections, and wait for the running requests."""
        self._server.shutdown()
        self._handling.wait(_DRAIN_S)
        self._server.server_close()


class _Handling:
    """Counts the running requests."""

    def __init__(self) -> None:
        self._count = 0
        self._changed = threading.Condition()

    def __enter__(self) -> None:
        with self._changed:
            self._count += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._count -= 1
            self._changed.notify_all()

    def wait(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._count, seconds)


class _Handler(BaseHTTPRequestHandler):
    model: InProcessModel
    handling: _Handling
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # send head and body in one write: a second one would wait for the first's ACK
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self._respond("GET")

    def do_POST(self) -> None:
        self._respond("POST")

    def log_message(self, format: str, *arguments: Any) -> None:
        """Do not log each request."""

    def _respond(self, method: str) -> None:
        with self.handling:
            try:
                length = _whole_number(self.headers.get("Content-Length", "0"))
                header_length = self.headers.get(_BINARY_HEADER)
                binary_from = _whole_number(header_length) if header_length is not None else None
                if length > MAX_BODY_BYTES:
                    raise _Bad(f"the request has {length} bytes, more than the limit of {MAX_BODY_BYTES}", 413)
                if "Transfer-Encoding" in self.headers or "Content-Encoding" in self.headers:
                    raise _Bad("a request must have a Content-Length and no transfer encoding", 411)
                done = answer(self.model, method, self.path, self.rfile.read(length), binary_from)
            except _Bad as bad:  # the body has not been read, so the connection cannot be reused
                self.close_connection = True
                done = _json({"error": str(bad)}, bad.status)
            self.send_response(done.status)
            binary = done.header_length is not None
            self.send_header("Content-Type", "application/octet-stream" if binary else "application/json")
            if binary:
                self.send_header(_BINARY_HEADER, str(done.header_length))
            if self.close_connection:
                self.send_header("Connection", "close")
            self.send_header("Content-Length", str(len(done.body)))
            self.end_headers()
            self.wfile.write(done.body)
            self.wfile.flush()


def _whole_number(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise _Bad(f"{text[:50]!r} is not a length")
    return int(text)
