"""Keep deploykit's server under mixed load, and judge whether its memory and its open files stay level.

Clients ask at random: short and long prompts, whole answers and streams, streams that leave, and bad requests. Writes
bench/results/<date>-generation-load.json; the exit status is 1 where something grows or an answer is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from generation import Prompts
from generation_contenders import ROOT, prepare, smollm2
from generation_serving import MODEL, running_server
from suite import begin, say, write_record

from deploykit.errors import ServerError
from deploykit.hardware import available_cpus

KINDS = ("whole", "stream", "leaves", "bad")
_SHARES = (0.3, 0.4, 0.2, 0.1)
_NEW_TOKENS = 64
_WARM_SHARE = 0.25
"""The first samples, while caches fill and memory becomes real, do not count."""
_LEVEL_MB_PER_HOUR = 30.0
_GAUGE = re.compile(r"^deploykit_(running|waiting)_answers\{[^}]*\} ([0-9.e+]+)$", re.MULTILINE)
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
    suite = begin("generation_load.py", available_cpus(), {}, ())
    prompts, export = _prompts_and_export(options)
    with running_server(export, options.precision) as addresses:
        load = Load(addresses["openai"], prompts, options.longest, options.pause, options.seed)
        samples = asyncio.run(load.run(addresses, 60 * options.minutes, options.clients, options.every))
    names = ("minutes", "clients", "pause", "precision")
    suite["settings"] = {name: getattr(options, name) for name in names}
    suite["outcomes"] = dict(load.outcomes)
    suite["samples"] = [asdict(sample) for sample in samples]
    suite["verdict"] = verdict(samples, load.outcomes)
    write_record(suite, options.out)
    for line in suite["verdict"]["reasons"] or ["level"]:
        say(line)
    raise SystemExit(1 if suite["verdict"]["reasons"] else 0)


def _prompts_and_export(options: argparse.Namespace) -> tuple[Prompts, Path]:
    if options.export:
        return Prompts(options.export), options.export
    checkpoint = options.checkpoint or smollm2(options.folder)
    prompts = Prompts(checkpoint)
    return prompts, prepare(checkpoint, options.folder, prompts.texts(8, 32)).export


class Load:
    """Clients of the server at ``url``; each waits ``pause`` seconds on average before a request. ``outcomes`` counts
    what became of the requests, by kind."""

    def __init__(self, url: str, prompts: Prompts, longest: int, pause: float, seed: int) -> None:
        self.outcomes: Counter[str] = Counter()
        self._url, self._prompts, self._longest, self._pause = url, prompts, longest, pause
        self._random = np.random.default_rng(seed)

    async def run(self, addresses: Mapping[str, Any], seconds: float, clients: int, every: float) -> list[Sample]:
        """Ask for ``seconds``, and return a sample at each ``every`` seconds and one after the last answer."""
        import httpx

        started = time.monotonic()
        samples = []
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self._url, timeout=600, limits=limits) as client:
            asking = [asyncio.create_task(self._ask_until(client, started + seconds)) for _ in range(clients)]
            while not all(task.done() for task in asking):
                await asyncio.wait(asking, timeout=every, return_when=asyncio.ALL_COMPLETED)
                samples.append(await asyncio.to_thread(take_sample, addresses, time.monotonic() - started))
                last = samples[-1]
                say(f"{last.seconds:.0f} s: {last.memory_mb:.0f} MB, {last.open_files} files, {last.running} running")
            await asyncio.gather(*asking)
        await asyncio.sleep(2)  # streams that left are noticed between two steps, and metrics are read afresh
        samples.append(await asyncio.to_thread(take_sample, addresses, time.monotonic() - started))
        return samples

    async def _ask_until(self, client: Any, end: float) -> None:
        while True:
            await asyncio.sleep(self._random.exponential(self._pause))
            if time.monotonic() >= end:
                return
            kind = str(self._random.choice(KINDS, p=_SHARES))
            try:
                outcome = await self._ask(client, kind)
            except Exception as error:  # whatever the client raises is an outcome
                outcome = f"{type(error).__name__}: {error}"[:200]
            self.outcomes[f"{kind}: {outcome}"] += 1

    async def _ask(self, client: Any, kind: str) -> str:
        """Send one request. Returns "as expected", or what was not."""
        tokens = int(np.exp(self._random.uniform(0, np.log(self._longest))))  # 1 to the longest, mostly short
        (text,) = self._prompts.texts(1, tokens)
        new = int(self._random.integers(1, _NEW_TOKENS + 1))
        body: dict[str, Any] = {
            "model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": new, "temperature": 0.7,
            "seed": int(self._random.integers(1 << 30)), "stream": kind in ("stream", "leaves"),
        }  # fmt: skip
        if kind == "bad":
            body |= _BAD[int(self._random.integers(len(_BAD)))]
        if not body["stream"]:
            response = await client.post("/chat/completions", json=body)
            expected = 400 <= response.status_code < 500 if kind == "bad" else response.status_code == 200
            return "as expected" if expected else f"status {response.status_code}: {response.text[:100]}"
        leaves_after = int(self._random.integers(0, new + 1)) if kind == "leaves" else None
        async with client.stream("POST", "/chat/completions", json=body) as response:
            if response.status_code != 200:
                return f"status {response.status_code}"
            count, last = 0, ""
            async for line in response.aiter_lines():
                if leaves_after is not None and count >= leaves_after:
                    return "as expected"
                count, last = count + bool(line), line or last
        return "as expected" if last == "data: [DONE]" else f"ends with {last[:100]}"


def take_sample(addresses: Mapping[str, Any], seconds: float) -> Sample:
    """Return the state of the server now. Raises ServerError where its process is gone."""
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
    gauges = dict(_GAUGE.findall(httpx.get(addresses["metrics"], timeout=60).text))
    return Sample(
        seconds, memory / 1e6, files, int(float(gauges.get("running", 0))), int(float(gauges.get("waiting", 0)))
    )


def verdict(samples: Sequence[Sample], outcomes: Mapping[str, int]) -> dict[str, Any]:
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
    parser.add_argument("--longest", type=int, default=1000, metavar="TOKENS", help="of a prompt")
    parser.add_argument("--precision", choices=("int8", "fp32"), default="int8")
    parser.add_argument("--checkpoint", type=Path, help="folder of another language model (default: SmolLM2, fetched)")
    parser.add_argument("--export", type=Path, help="folder of an export to serve, instead of one of a checkpoint")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "demo/generation-bench", help="where its other forms are made and kept"
    )
    parser.add_argument("--seed", type=int, default=0)
    default = ROOT / "bench" / "results" / f"{datetime.date.today()}-generation-load.json"
    parser.add_argument("--out", type=Path, default=default)
    return parser.parse_args()


if __name__ == "__main__":
    main()
