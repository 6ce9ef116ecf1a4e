"""A collector of OpenTelemetry spans, OTLP over HTTP."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Span:
    """A span. Ids are in hex; ``events`` are names."""

    service: str
    name: str
    trace: str
    id: str
    parent: str
    begin: int
    end: int
    events: tuple[str, ...]


@contextmanager
def collector() -> Iterator[tuple[str, list[Span]]]:
    """Yield the address of a collector, and the spans that came."""
    from google.protobuf.json_format import MessageToDict
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    spans: list[Span] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = self.headers.get("Content-Length")
            body = self.rfile.read(int(length)) if length else _chunks(self.rfile)
            if "json" in self.headers["Content-Type"]:  # as Triton sends them, with ids in hex
                spans.extend(_spans(json.loads(body), lambda digits: digits))
            else:
                record = MessageToDict(ExportTraceServiceRequest.FromString(body))
                spans.extend(_spans(record, lambda text: base64.b64decode(text).hex()))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", spans
    finally:
        server.shutdown()
        server.server_close()


def _spans(record: Any, hex_of: Callable[[str], str]) -> Iterator[Span]:
    for resource in record["resourceSpans"]:
        names = {one["key"]: one["value"].get("stringValue", "") for one in resource["resource"]["attributes"]}
        for span in (span for scope in resource["scopeSpans"] for span in scope["spans"]):
            yield Span(
                names["service.name"], span["name"], hex_of(span["traceId"]), hex_of(span["spanId"]),
                hex_of(span.get("parentSpanId", "")), int(span["startTimeUnixNano"]), int(span["endTimeUnixNano"]),
                tuple(event["name"] for event in span.get("events", ())),
            )  # fmt: skip


def _chunks(file) -> bytes:  # type: ignore[no-untyped-def]
    content = b""
    while size := int(file.readline(), 16):
        content += file.read(size)
        file.readline()
    return content
