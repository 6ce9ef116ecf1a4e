"""Schemathesis, in an environment of its own, asks the OpenAI port whatever its OpenAPI document allows, and what it forbids."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from each_task import package_each_task
from served import start

from deploykit.openai.app import create_app
from deploykit.openai.server import OpenAIServer
from deploykit.openai.triton_generator import TritonGenerator
from deploykit.tasks.opening import open_served
from deploykit.tasks.text_generation.chat_template import CHATML
from deploykit.triton.preflight import listen

SCHEMATHESIS = Path(os.environ.get("SCHEMATHESIS_VENV", "/tmp/deploykit-schemathesis")) / "bin" / "schemathesis"
EXAMPLES = int(os.environ.get("FUZZ_REQUESTS", "50"))
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
pytestmark = pytest.mark.skipif(
    not SCHEMATHESIS.is_file(),
    reason=f"{SCHEMATHESIS} is missing: make interop installs it in an environment of its own",
)


@pytest.fixture(scope="module")
def root(tiny_export: Path, tiny_translation: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a port with a model of each task."""
    folder = tmp_path_factory.mktemp("asked")
    repository = package_each_task(folder, tiny_export, tiny_translation, template=CHATML)
    with start(repository) as server:
        app = create_app(
            server.tasks, TritonGenerator(server.urls.grpc), lambda name: open_served(name, server.urls.http), created=1,
            metrics_url=server.urls.metrics,
        )  # fmt: skip
        with OpenAIServer(app, listen("openai", "127.0.0.1", 0), drain=5.0) as port:
            yield port.url.removesuffix("/v1")


def test_no_request_of_the_document_ends_in_500_or_an_undocumented_status(root: str, tmp_path: Path) -> None:
    document = httpx.get(f"{root}/openapi.json").json()
    names = {"CompletionBody": ["lm"], "ChatBody": ["lm"], "TextsBody": ["tiny", "fr", "qa", "lm"]}
    for body, models in names.items():  # most names are of no model, and so are most requests
        document["components"]["schemas"][body]["properties"]["model"]["enum"] = models
    for body in ("CompletionBody", "ChatBody"):  # a thousand tokens of a random model say no more than four
        document["components"]["schemas"][body]["properties"]["max_tokens"] = {
            "type": "integer",
            "minimum": 0,
            "maximum": 4,
        }
        document["components"]["schemas"][body]["required"].append("max_tokens")
    schema = tmp_path / "openapi.json"
    schema.write_text(httpx.Response(200, json=document).text)
    command = [SCHEMATHESIS, "run", schema, "--url", root, "--checks", CHECKS, "--phases", "examples,coverage,fuzzing", "--mode", "all",
               "--max-examples", str(EXAMPLES), "--seed", "0", "--request-timeout", "60", "--no-color"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert httpx.get(f"{root}/health").status_code == 200
    print(done.stdout[-1500:])
