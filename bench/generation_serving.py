"""Measure deploykit's and llama.cpp's servers as streaming clients see them; guidellm can measure deploykit's too."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from generation_contenders import DEPLOYKIT, LLAMA, PEERS_PYTHON, Contender, Subject, convert, missing
from suite import say

from deploykit.bench.run import spread
from deploykit.demo import served
from deploykit.openai.measure import StreamLoad, ask
from deploykit.triton.repository import package

if TYPE_CHECKING:
    from generation import Plan, Prompts

MODEL = "model"
SERVERS = (Contender(DEPLOYKIT, "int8"), Contender(DEPLOYKIT, "fp32"), Contender(LLAMA, "q8_0"))
_REQUESTS = 2
"""Requests of each client in a round."""
_FIGURES = (
    "tokens_per_s", "first_token_p50_ms", "first_token_p99_ms", "between_tokens_p50_ms", "between_tokens_p99_ms"
)  # fmt: skip


@contextlib.contextmanager
def running_server(export: Path, precision: str) -> Iterator[dict[str, Any]]:
    """Serve an export with the OpenAI port. Yields its addresses and pid."""
    with tempfile.TemporaryDirectory() as repository:
        package(export, MODEL, Path(repository), precision=precision)
        with served(say, Path(repository), "--openai-port", "0") as addresses:
            yield addresses


@contextlib.contextmanager
def _running_llama(file: str, threads: int, context: int) -> Iterator[str]:
    """Run llama.cpp's server. Yields the URL of its OpenAI routes."""
    command = [str(PEERS_PYTHON), str(Path(__file__).with_name("llama_server.py"))]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps({"file": file, "threads": threads, "context": context}) + "\n")
        process.stdin.flush()
        address = process.stdout.readline().strip()
        if not address:
            raise SystemExit("llama.cpp's server ended before it answered: run bench/llama_server.py to see why")
        yield f"{address}/v1"
    finally:
        process.kill()
        process.wait()


def measure_served(subject: Subject, prompts: Prompts, plan: Plan) -> dict[str, Any]:
    """Return the figures of each server and number of streaming clients; the servers take turns."""
    loads: dict[tuple[Contender, int], list[StreamLoad]] = {}
    with contextlib.ExitStack() as stack:
        urls = {}
        for server in (server for server in SERVERS if not missing(server)):
            if server.engine == DEPLOYKIT:
                urls[server] = stack.enter_context(running_server(subject.export, server.precision))["openai"]
            else:
                file = convert(server, subject)["file"]
                urls[server] = stack.enter_context(_running_llama(file, plan.threads, subject.task.max_length))
        for number in range(-1, plan.rounds):  # the first is a warm-up
            for clients in plan.clients:
                for server, url in urls.items():
                    texts = prompts.texts(max(_REQUESTS * clients, 4), plan.prompt_tokens)
                    _, load = ask(
                        url, MODEL, texts, concurrency=clients, max_tokens=plan.new_tokens,
                        extra_body={"ignore_eos": True},
                    )  # fmt: skip
                    if number >= 0:
                        loads.setdefault((server, clients), []).append(load)
                        say(
                            f"round {number + 1}: {server.name}, {clients} clients: {load.tokens_per_s:.0f} tokens/s, "
                            f"first token after {load.first_token_p50_ms:.0f} ms"
                        )
    return {
        "key": "served",
        "rounds": plan.rounds,
        "loads": [summary(server, load) for (server, _), load in loads.items()],
    }


def measure_by_guidellm(program: Path, export: Path, checkpoint: Path, plan: Plan, report: Path) -> None:
    """Measure the INT8 server with guidellm, on loopback, with the checkpoint's tokenizer; it writes its own report."""
    text = {"kind": "synthetic_text", "prompt_tokens": plan.prompt_tokens, "output_tokens": plan.new_tokens}
    with running_server(export, SERVERS[0].precision) as addresses, tempfile.TemporaryDirectory() as folder:
        spec = {
            "backend": {"kind": "openai_http", "target": addresses["openai"].removesuffix("/v1"), "model": MODEL},
            "profile": {"kind": "concurrent", "streams": list(plan.clients)},
            "constraints": [{"kind": "max_requests", "count": [_REQUESTS * max(n, 2) for n in plan.clients]}],
            "tokenizer": {"kind": "huggingface_auto", "model": str(checkpoint)},
            "data": [text],
            "outputs": [{"kind": "json", "path": str(report)}],
            "metrics": {"kind": "generative", "sample_size": 0},
        }
        scenario = Path(folder, "scenario.json")
        scenario.write_text(json.dumps({"spec": spec}))
        subprocess.run(
            [str(program), "run", "--config", str(scenario), "--disable-console"],
            check=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )


def summary(server: Contender, rounds: Sequence[StreamLoad]) -> dict[str, Any]:
    """Return the figures of one load: median, least and most of all rounds."""
    figures = [asdict(load) for load in rounds]
    found = {name: spread([one[name] for one in figures]) for name in _FIGURES}
    return {
        "server": server.engine,
        "precision": server.precision,
        "clients": rounds[0].concurrency,
        "requests": sum(load.requests for load in rounds),
        "tokens": sum(load.tokens for load in rounds),
        **found,
    }
