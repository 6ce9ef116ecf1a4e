"""Triton's gRPC server around a ``FakeGenerator``: the tensors and errors of a decoupled text-generation model."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
from fake_generator import FakeGenerator
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor

from deploykit.openai.errors import ApiError
from deploykit.openai.generator import GenerationRequest, Piece

_DTYPES: dict[str, tuple[str, type]] = {
    "num_input_tokens": ("UINT32", np.uint32),
    "num_output_tokens": ("UINT32", np.uint32),
}


class FakeTriton(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Serves ``model`` at ``address`` in a thread while the block runs."""

    def __init__(self, port: int = 0) -> None:
        self.model = FakeGenerator()
        self.address = ""
        self._port = port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> FakeTriton:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        """Break all connections, and listen no more."""
        if not self._loop.is_closed():
            asyncio.run_coroutine_threadsafe(self._server.stop(None), self._loop).result(10)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    async def _start(self) -> None:
        self._server = grpc.aio.server()
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, self._server)
        self._port = self._server.add_insecure_port(f"127.0.0.1:{self._port}")
        self.address = f"127.0.0.1:{self._port}"
        await self._server.start()

    async def ServerReady(self, request: Any, context: Any) -> Any:
        return service_pb2.ServerReadyResponse(ready=await self.model.ready())

    async def ModelStreamInfer(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        # Triton 2.51 may crash at an error in a stream with this header.
        assert "triton_grpc_error" not in dict(context.invocation_metadata())
        async for request in requests:
            asked = read(request)
            wanted = [output.name for output in request.outputs]
            try:
                async for piece in self.model.generate(asked):
                    yield service_pb2.ModelStreamInferResponse(infer_response=write(piece, wanted))
            except ApiError as error:
                if error.restarting:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, error.message)
                yield service_pb2.ModelStreamInferResponse(error_message=error.message)


def read(request: Any) -> GenerationRequest:
    """Return what the tensors of a request ask for."""
    values: dict[str, Any] = {}
    for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True):
        if tensor.name == "input_ids":
            values[tensor.name] = np.frombuffer(raw, np.int64).tolist()
            assert list(tensor.shape) == [len(values[tensor.name])]
            continue
        assert list(tensor.shape) == [1]
        if tensor.datatype == "BYTES":
            values[tensor.name] = deserialize_bytes_tensor(raw)[0].decode()
        else:
            values[tensor.name] = bool(np.frombuffer(raw, np.bool_)[0])
    assert values["exclude_input_in_output"]
    assert len(values.keys() & {"text_input", "input_ids", "messages"}) == 1
    return GenerationRequest(
        request.model_name,
        json.loads(values["sampling_parameters"]),
        values.get("text_input"),
        values.get("messages"),
        values["stream"],
        values["return_logprobs"],
        values.get("input_ids"),
    )


def write(piece: Piece, wanted: list[str]) -> Any:
    """Return the requested tensors of a piece."""
    columns: dict[str, list[Any]] = {
        "text_output": list(piece.texts),
        "finish_reason": list(piece.finishes),
        "num_input_tokens": [piece.prompt_tokens],
        "num_output_tokens": list(piece.tokens),
        "logprobs": [json.dumps(rows) for rows in piece.logprobs],
    }
    response = service_pb2.ModelInferResponse(model_name="m")
    for name in wanted:
        datatype, dtype = _DTYPES.get(name, ("BYTES", np.object_))
        values = columns[name]
        response.outputs.add(name=name, datatype=datatype, shape=[len(values)])
        if datatype == "BYTES":
            raw = serialize_byte_tensor(np.array([value.encode() for value in values], np.object_)).item()
        else:
            raw = np.array(values, dtype).tobytes()
        response.raw_output_contents.append(raw)
    return response
