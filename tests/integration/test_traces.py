"""Spans of the OpenAI port, of Triton and of a model's process join the caller's trace."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import language_models
import numpy as np
import pytest
import tritonclient.grpc as triton
from served import body, wait_until
from tiny_answerer import write_export
from trace_collector import Span, collector

from deploykit.tasks.text_generation.chat_template import CHATML
from deploykit.triton.repository import package

pytest.importorskip("opentelemetry.sdk", reason="needs OpenTelemetry: pip install 'deploykit[otel]'")

CALLER = "00f067aa0ba902b7"


def _headers(trace: str) -> dict[str, str]:
    return {"traceparent": f"00-{trace}-{CALLER}-01"}


def _ask_grpc(address: str, headers: dict[str, str]) -> None:
    text = triton.InferInput("TEXT", [1, 1], "BYTES")
    text.set_data_from_numpy(np.array([[b"w1"]], np.object_))
    with triton.InferenceServerClient(address) as client:
        client.infer("tiny", [text], headers=headers)


def test_spans_join_the_trace_of_the_caller(tiny_export: Path, tiny_translation: Path, tmp_path: Path) -> None:
    package(tiny_export, "tiny", tmp_path / "models", engine="onnxruntime", precision="fp32")
    package(tiny_translation, "fr", tmp_path / "models", engine="onnxruntime", stream=False)
    package(write_export(tmp_path / "qa"), "qa", tmp_path / "models", engine="onnxruntime", precision="fp32")
    package(language_models.write_export(tmp_path / "lm", template=CHATML), "lm", tmp_path / "models")
    ready = tmp_path / "ready.json"
    by_route, by_port, by_http, by_grpc = (digit * 32 for digit in "abcd")
    translated, answered, generated, streamed = (digit * 32 for digit in "ef12")
    with collector() as (endpoint, spans):
        server = subprocess.Popen(
            [sys.executable, "-m", "deploykit", "serve", "--model-repository", str(tmp_path / "models"), "--http-port", "0",
             "--grpc-port", "0", "--metrics-port", "0", "--openai-port", "0", "--triton-routes", "--ready-file", str(ready),
             "--drain", "5", "--otlp-endpoint", endpoint],
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            assert wait_until(lambda: ready.exists() or server.poll() is not None, 90)
            assert ready.exists(), server.communicate()[1]
            urls = json.loads(ready.read_text())
            with httpx.Client(timeout=30) as client:
                asked = {"model": "tiny", "input": ["w1 w2", "w3"]}
                dialog = {"model": "lm", "messages": [{"role": "user", "content": "list"}], "max_tokens": 3}
                infer = "v2/models/tiny/infer"
                for url, trace, content in (
                    (f"{urls['openai']}/classify", by_port, asked),
                    (f"{urls['openai']}/translate", translated, {"model": "fr", "input": ["a b c"]}),
                    (f"{urls['openai']}/answer", answered, {"model": "qa", "input": [["which w1 ?", "w2 w3 w1"]]}),
                    (f"{urls['openai']}/chat/completions", generated, dialog),
                    (f"{urls['openai']}/chat/completions", streamed, {**dialog, "stream": True}),
                    (f"{urls['openai'].removesuffix('v1')}{infer}", by_route, body(["w1"])),
                    (f"{urls['http']}/{infer}", by_http, body(["w1"])),
                ):
                    client.post(url, json=content, headers=_headers(trace)).raise_for_status()
            _ask_grpc(urls["grpc"], _headers(by_grpc))
            server.send_signal(signal.SIGTERM)
            _, printed = server.communicate(timeout=30)
            assert server.returncode == 0, printed
        finally:
            server.kill()
            server.wait()

    for trace, front in (
        (by_port, "POST /v1/classify"),
        (by_route, "POST /v2/{path}"),
        (by_http, ""),
        (by_grpc, ""),
    ):
        mine = [span for span in spans if span.trace == trace]
        [request] = [span for span in mine if span.service == "triton" and "QUEUE_START" in _below(span, mine)
                     and span.parent not in {one.id for one in mine if one.service == "triton"}]  # fmt: skip
        if front:
            [outer] = [span for span in mine if span.service == "deploykit"]
            assert (outer.name, outer.parent, request.parent) == (front, CALLER, outer.id)
        else:
            assert request.parent == CALLER
        for name in ("tokenize", "encode"):
            [stage] = [span for span in mine if (span.service, span.name) == ("deploykit-model", name)]
            assert stage.parent in {span.id for span in mine if span.service == "triton"}
            assert request.begin <= stage.begin < stage.end <= request.end

    for trace, expected in (
        (translated, ["tokenize", "queue", "decode", "detokenize"]),
        (answered, ["tokenize", "encode", "spans"]),
        (generated, ["tokenize", "queue", "decode", "detokenize"]),
        (streamed, ["tokenize", "queue", "decode", "detokenize"]),
    ):
        stages = [span for span in spans if (span.trace, span.service) == (trace, "deploykit-model")]
        assert [span.name for span in stages] == expected
        assert all(one.begin <= one.end <= following.begin for one, following in itertools.pairwise(stages))
        assert len({span.parent for span in stages} & {span.id for span in spans if span.service == "triton"}) == 1


def _below(span: Span, spans: list[Span]) -> set[str]:
    """Return the names of the events of a span and of those below it."""
    return set(span.events).union(*(_below(one, spans) for one in spans if one.parent == span.id))
