"""Keep one server under a mixed load of several tasks, and check whether its memory, open files and latencies stay level.

Clients send random requests: to a classifier over HTTP, to a translator over gRPC, and to a language model on the OpenAI port for whole
answers, streams, cancelled streams and bad requests. For the first two, each answer is compared with the one that the idle
server gave. Writes bench/results/<date>-soak.json; the exit status is 1 where something grows or an answer is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import re
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from generation_contenders import ROOT, prepare, smollm2
from suite import begin, say, write_record

from deploykit.artifacts import load_manifest
from deploykit.demo import served
from deploykit.errors import ServerError
from deploykit.hardware import available_cpus
from deploykit.runtime.serving_settings import ServingSettings
from deploykit.triton.repository import package

SHARES = {"classify": 4.0, "translate": 2.0, "whole": 0.9, "stream": 1.2, "leaves": 0.6, "bad": 0.3}
"""Relative frequency of each kind of request; kinds without a model are left out."""
_OF_TASK = {
    "classification": ("classify",), "translation": ("translate",), "text-generation": ("whole", "stream", "leaves", "bad"),
}  # fmt: skip
_NEW_TOKENS = 64
_KNOWN = 16
"""Number of texts whose answers are compared."""
_SENTENCE_WORDS = 30
_WARM_SHARE = 0.25
"""Number of first samples that do not count, while caches fill and memory is allocated."""
_LEVEL_MB_PER_HOUR = 30.0
_LEVEL_LATENCY = 1.5
_FEW_MINUTES = 4
"""Minimum minutes for judging latencies."""
_GAUGE = re.compile(r"^deploykit_(running|waiting)_sequences\{[^}]*\} ([0-9.e+]+)$", re.MULTILINE)
_BAD: tuple[Mapping[str, Any], ...] = (
    {"temperature": -1},
    {"messages": []},
    {"messages": [{"role": "nobody", "content": "a"}]},
    {"model": "unknown"},
    {"max_tokens": "many"},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}},
)


@dataclass(frozen=True)
class Sample:
    """State of the server ``seconds`` after the start: memory of all its processes in 1e6 bytes, their open files, and
    the answers that run and wait."""

    seconds: float
    memory_mb: float
    open_files: int
    running: int
    waiting: int


def main() -> None:
    options = _options()
    suite = begin("soak.py", available_cpus(), {}, ())
    exports = {load_manifest(folder, "export").task.name: folder for folder in options.export or [_smollm2(options)]}
    if not exports.keys() <= _OF_TASK.keys():
        raise SystemExit(f"error: --export: only of the tasks {', '.join(_OF_TASK)}")
    with _server(exports, options.precision, options.max_cache_mb) as addresses:
        load = Load(addresses, options.longest, options.pause, options.seed)
        samples = asyncio.run(load.run(60 * options.minutes, options.clients, options.every))
    names = ("minutes", "clients", "pause", "precision", "max_cache_mb")
    suite["settings"] = {name: getattr(options, name) for name in names} | {"tasks": sorted(exports)}
    suite["outcomes"] = dict(load.outcomes)
    suite["minutes"] = by_minute(load.latencies)
    suite["samples"] = [asdict(sample) for sample in samples]
    suite["verdict"] = verdict(samples, load.outcomes, suite["minutes"])
    write_record(suite, options.out)
    for line in suite["verdict"]["reasons"] or ["level"]:
        say(line)
    raise SystemExit(1 if suite["verdict"]["reasons"] else 0)


def _smollm2(options: argparse.Namespace) -> Path:
    checkpoint = options.checkpoint or smollm2(options.folder)
    return prepare(checkpoint, options.folder, Texts(0).draw(8, 32)).export


@contextlib.contextmanager
def _server(exports: Mapping[str, Path], precision: str, max_cache_mb: int) -> Iterator[dict[str, Any]]:
    """Serve exports under the names of their tasks. Yields the addresses, and the pid of Triton."""
    with tempfile.TemporaryDirectory() as repository:
        for task, export in exports.items():
            settings = ServingSettings() if task == "classification" else ServingSettings(max_cache_mb=max_cache_mb)
            package(export, task, Path(repository), precision=precision, settings=settings)
        with served(say, Path(repository), "--openai-port", "0") as addresses:
            yield addresses


class Texts:
    """Windows at random positions of this project's documentation."""

    def __init__(self, seed: int) -> None:
        pages = (path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
        self._words = " ".join(pages).split()
        self._random = np.random.default_rng(seed)

    def draw(self, count: int, words: int) -> list[str]:
        starts = self._random.integers(0, len(self._words) - words, count).tolist()
        return [" ".join(self._words[start : start + words]) for start in starts]


class Load:
    """Clients of the server at ``addresses``; each waits ``pause`` seconds on average before a request. ``outcomes`` counts
    the results of the requests, by kind, and ``latencies`` has the second, the kind and the milliseconds of each answer: for a
    stream, to its first piece."""

    def __init__(self, addresses: Mapping[str, Any], longest: int, pause: float, seed: int) -> None:
        self.outcomes: Counter[str] = Counter()
        self.latencies: list[tuple[float, str, float]] = []
        self._addresses, self._longest, self._pause = addresses, longest, pause
        self._random = np.random.default_rng(seed)
        self._texts = Texts(seed)
        self._known: dict[str, dict[str, str]] = {}  # by kind, the answers of the idle server to some texts
        kinds = [kind for task in addresses["models"] for kind in _OF_TASK.get(task, ())]
        shares = np.array([SHARES[kind] for kind in kinds])
        self._kinds, self._shares = kinds, shares / shares.sum()

    async def run(self, seconds: float, clients: int, every: float) -> list[Sample]:
        """Send requests for ``seconds``, and return a sample every ``every`` seconds and one after the last answer."""
        import httpx
        import tritonclient.grpc.aio as triton

        samples = []
        limits = httpx.Limits(max_connections=None)
        async with (
            httpx.AsyncClient(timeout=600, limits=limits) as self._http,
            triton.InferenceServerClient(self._addresses["grpc"]) as self._grpc,
        ):
            await self._ask_idle()
            self._started = time.monotonic()
            asking = [asyncio.create_task(self._ask_until(self._started + seconds)) for _ in range(clients)]
            while not all(task.done() for task in asking):
                await asyncio.wait(asking, timeout=every, return_when=asyncio.ALL_COMPLETED)
                samples.append(await asyncio.to_thread(take_sample, self._addresses, time.monotonic() - self._started))
                last = samples[-1]
                say(f"{last.seconds:.0f} s: {last.memory_mb:.0f} MB, {last.open_files} files, {last.running} running")
            await asyncio.gather(*asking)
        await asyncio.sleep(2)  # cancelled streams are noticed between two steps, and then metrics are read again
        samples.append(await asyncio.to_thread(take_sample, self._addresses, time.monotonic() - self._started))
        return samples

    async def _ask_idle(self) -> None:
        for kind in {"classify", "translate"}.intersection(self._kinds):
            words = min(self._longest, _SENTENCE_WORDS)
            texts = [text for n in range(_KNOWN) for text in self._texts.draw(1, 1 + n * (words - 1) // _KNOWN)]
            self._known[kind] = {text: await self._asker(kind)(text) for text in texts}

    async def _ask_until(self, end: float) -> None:
        while True:
            await asyncio.sleep(self._random.exponential(self._pause))
            if time.monotonic() >= end:
                return
            kind = str(self._random.choice(self._kinds, p=self._shares))
            try:
                outcome = await (self._compare(kind) if kind in self._known else self._chat(kind))
            except Exception as error:  # any exception of the client is an outcome
                outcome = f"{type(error).__name__}: {error}"[:200]
            self.outcomes[f"{kind}: {outcome}"] += 1

    def _answered(self, kind: str, begun: float) -> None:
        now = time.monotonic()
        self.latencies.append((now - self._started, kind, 1000 * (now - begun)))

    def _asker(self, kind: str) -> Callable[[str], Coroutine[Any, Any, str]]:
        return self._classify if kind == "classify" else self._translate

    async def _compare(self, kind: str) -> str:
        """Send a text with a known answer. Returns "as expected", or the difference."""
        text = str(self._random.choice(list(self._known[kind])))
        begun = time.monotonic()
        answer = await self._asker(kind)(text)
        self._answered(kind, begun)
        return "as expected" if answer == self._known[kind][text] else f"another answer: {answer[:100]}"

    async def _classify(self, text: str) -> str:
        tensor = {"name": "TEXT", "datatype": "BYTES", "shape": [1, 1], "data": [text]}
        url = f"{self._addresses['http']}/v2/models/classification/infer"
        response = await self._http.post(url, json={"inputs": [tensor], "outputs": [{"name": "LABEL"}]})
        if response.status_code != 200:
            raise ServerError(f"status {response.status_code}: {response.text[:100]}")
        return str(response.json()["outputs"][0]["data"][0])

    async def _translate(self, text: str) -> str:
        import tritonclient.grpc.aio as triton

        tensor = triton.InferInput("TEXT", [1, 1], "BYTES")
        tensor.set_data_from_numpy(np.array([[text.encode()]], np.object_))
        answer = await self._grpc.infer("translation", [tensor], outputs=[triton.InferRequestedOutput("TRANSLATION")])
        return str(answer.as_numpy("TRANSLATION").item().decode())

    async def _chat(self, kind: str) -> str:
        """Send one request to the language model. Returns "as expected", or the difference."""
        words = int(np.exp(self._random.uniform(0, np.log(self._longest))))  # 1 to the longest, mostly short
        (text,) = self._texts.draw(1, words)
        new = int(self._random.integers(1, _NEW_TOKENS + 1))
        body: dict[str, Any] = {
            "model": "text-generation", "messages": [{"role": "user", "content": text}], "max_tokens": new, "temperature": 0.7,
            "seed": int(self._random.integers(1 << 30)), "stream": kind in ("stream", "leaves"),
        }  # fmt: skip
        if kind == "bad":
            body |= _BAD[int(self._random.integers(len(_BAD)))]
        url, begun = f"{self._addresses['openai']}/chat/completions", time.monotonic()
        if not body["stream"]:
            response = await self._http.post(url, json=body)
            if kind == "whole":
                self._answered(kind, begun)
            expected = 400 <= response.status_code < 500 if kind == "bad" else response.status_code == 200
            return "as expected" if expected else f"status {response.status_code}: {response.text[:100]}"
        leaves_after = int(self._random.integers(0, new + 1)) if kind == "leaves" else None
        async with self._http.stream("POST", url, json=body) as response:
            if response.status_code != 200:
                return f"status {response.status_code}"
            count, last = 0, ""
            async for line in response.aiter_lines():
                if leaves_after is not None and count >= leaves_after:
                    return "as expected"
                if line and not count and kind == "stream":
                    self._answered(kind, begun)
                count, last = count + bool(line), line or last
        return "as expected" if last == "data: [DONE]" else f"ends with {last[:100]}"


def by_minute(latencies: Sequence[tuple[float, str, float]]) -> list[dict[str, Any]]:
    """Return for each minute and kind of request the number of answers, and the median and p99 of their milliseconds."""
    found: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for second, kind, milliseconds in latencies:
        found[int(second // 60)][kind].append(milliseconds)
    return [
        {
            "minute": minute,
            **{
                kind: {"answers": len(each), "p50_ms": float(np.median(each)), "p99_ms": float(np.percentile(each, 99))}
                for kind, each in sorted(found[minute].items())
            },
        }
        for minute in sorted(found)
    ]


def take_sample(addresses: Mapping[str, Any], seconds: float) -> Sample:
    """Return the state of the server now. Raises ServerError if its process has ended."""
    import httpx
    import psutil

    try:
        # The pid is that of Triton, which ``deploykit serve`` started.
        server = psutil.Process(addresses["pid"]).parent()
        processes = [server, *server.children(recursive=True)]
    except psutil.NoSuchProcess:
        raise ServerError("the server's process is gone", "see its log") from None
    memory = files = 0
    for process in processes:
        with contextlib.suppress(psutil.Error):  # it ended just now
            memory += process.memory_info().rss
            files += process.num_fds()
    gauges: Counter[str] = Counter()
    for name, value in _GAUGE.findall(httpx.get(addresses["metrics"], timeout=60).text):
        gauges[name] += round(float(value))
    return Sample(seconds, memory / 1e6, files, gauges["running"], gauges["waiting"])


def verdict(
    samples: Sequence[Sample], outcomes: Mapping[str, int], minutes: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """Return growth in MB and files per hour, and the reasons why the server fails, if any.

    Growth is the slope of a line through the samples after the first quarter (Theil-Sen: the median of the slopes of all
    pairs), which single peaks do not move. The last sample, of the idle server, is not on it.
    """
    loaded = samples[:-1]
    settled = loaded[int(len(loaded) * _WARM_SHARE) :]
    hours = [sample.seconds / 3600 for sample in settled]
    memory = slope(hours, [sample.memory_mb for sample in settled])
    files = slope(hours, [sample.open_files for sample in settled])
    span = hours[-1] - hours[0] if hours else 0.0
    reasons = []
    if memory * span > max(_LEVEL_MB_PER_HOUR * span, 0.02 * settled[0].memory_mb):
        reasons.append(f"memory grows: {memory:.0f} MB an hour")
    if files * span >= 2:
        reasons.append(f"open files grow: {files:.0f} an hour")
    if samples[-1].running or samples[-1].waiting:
        reasons.append(f"{samples[-1].running} answers run and {samples[-1].waiting} wait after the last client left")
    settled_minutes = minutes[int(len(minutes) * _WARM_SHARE) : -1]  # the last is a part of a minute
    if len(settled_minutes) >= _FEW_MINUTES:
        reasons += _slower(settled_minutes)
    wrong = {name: count for name, count in outcomes.items() if not name.endswith(": as expected")}
    reasons += [f"{count} requests: {name}" for name, count in wrong.items()]
    return {
        "memory_mb_per_hour": memory,
        "open_files_per_hour": files,
        "memory_mb": [settled[0].memory_mb, settled[-1].memory_mb],
        "open_files": [settled[0].open_files, settled[-1].open_files],
        "hours": span,
        "reasons": reasons,
    }


def _slower(minutes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a reason for each kind of request whose p99 grows, by the line through the minutes."""
    reasons = []
    for kind in SHARES:
        found = [(one["minute"], one[kind]["p99_ms"]) for one in minutes if kind in one]
        if len(found) < _FEW_MINUTES:
            continue
        at, p99 = zip(*found)
        growth = slope(at, p99) * (at[-1] - at[0])
        if growth > (_LEVEL_LATENCY - 1) * float(np.median(p99)):
            reasons.append(f"{kind}: p99 grows by {growth:.0f} ms, its median is {np.median(p99):.0f} ms")
    return reasons


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the median of the slopes between all pairs of points; 0 for a single point."""
    xs, ys = np.array(x), np.array(y)
    i, j = np.triu_indices(len(xs), 1)
    return float(np.median((ys[j] - ys[i]) / (xs[j] - xs[i]))) if len(i) else 0.0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument(
        "--pause", type=float, default=0.0, metavar="SECONDS", help="before a client's next request, on average"
    )
    parser.add_argument("--every", type=float, default=10.0, metavar="SECONDS", help="between two samples")
    parser.add_argument("--longest", type=int, default=700, metavar="WORDS", help="of a prompt")
    parser.add_argument("--precision", choices=("auto", "int8", "fp32"), default="auto")
    parser.add_argument(
        "--max-cache-mb", type=int, default=ServingSettings.max_cache_mb,
        help="as of package: a language model's memory grows until kept prompts fill a quarter of it (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--checkpoint", type=Path, help="folder of another language model (default: SmolLM2, fetched)")
    parser.add_argument(
        "--export", type=Path, action="append",
        help="folder of an export to serve: of a classifier, a translator or a language model; once for each (default: one of a checkpoint)",
    )  # fmt: skip
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "demo/generation-bench", help="where its other forms are made and kept"
    )
    parser.add_argument("--seed", type=int, default=0)
    default = ROOT / "bench" / "results" / f"{datetime.date.today()}-soak.json"
    parser.add_argument("--out", type=Path, default=default)
    return parser.parse_args()


if __name__ == "__main__":
    main()
