from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from deploykit.cli_parts.command import Result, deploykit_command
from deploykit.errors import ServerError
from deploykit.runtime.serving_settings import API_KEY_VARIABLE
from deploykit.text_table import text_table

if TYPE_CHECKING:
    from deploykit.triton.load import ModelLoad, PortLoad

_HEAD = (
    "model", "req/s", "failed/s", "batch", "queue ms", "request ms", "p50 s", "p99 s", "waiting", "running", "tokens/s", "KV cache",
)  # fmt: skip


@deploykit_command(help="Show what the models of a running server do, from its metrics at URL.")
@click.argument("url", default="http://localhost:8002/metrics")
@click.option("--interval", type=click.FloatRange(0.1, 3600), default=2.0, show_default=True, help="Seconds between readings.")  # fmt: skip
@click.option("--once", is_flag=True, help="Print one table and stop, as with --json or in a pipe; otherwise refresh it until Ctrl-C.")  # fmt: skip
@click.option("--api-key", envvar=API_KEY_VARIABLE, show_envvar=True, metavar="KEY", help="Key of the OpenAI port, if URL is an OpenAI port.")  # fmt: skip
def command(*, url: str, interval: float, once: bool, api_key: str | None) -> Result:
    from deploykit.triton.load import model_loads, port_load, read_metrics

    as_json = click.get_current_context().params["as_json"]
    live = not (once or as_json) and sys.__stdout__ is not None and sys.__stdout__.isatty()
    before = read_metrics(url, api_key)
    with _screen() if live else contextlib.nullcontext(lambda text: None) as show:
        while True:
            try:
                time.sleep(interval)
                after = read_metrics(url, api_key)
            except KeyboardInterrupt:
                return {}, ""
            except ServerError as error:
                if not live:
                    raise
                show(f"{error.message}")  # a server that starts again
                continue
            models, port = model_loads(before, after), port_load(before, after)
            if not live:
                break
            show(_text(models, port))
            before = after
    record: dict[str, Any] = {"seconds": after.time - before.time, "models": [_known(model) for model in models]}
    if port is not None:
        record["port"] = dataclasses.asdict(port)
    return record, _text(models, port)


@contextlib.contextmanager
def _screen() -> Iterator[Callable[[str], None]]:
    """Yield a function that shows a text in place of the last one, on stderr."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    with Live(Text("measuring …"), console=Console(stderr=True), auto_refresh=False) as screen:
        yield lambda text: screen.update(Text(text, no_wrap=True, overflow="crop"), refresh=True)


def _known(load: ModelLoad) -> dict[str, Any]:
    """Return the fields for JSON, with None for unknown values."""
    fields = dataclasses.asdict(load).items()
    return {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in fields}


def _text(models: Sequence[ModelLoad], port: PortLoad | None) -> str:
    rows = [
        (
            load.model,
            f"{load.requests:.1f}",
            f"{load.failures:.1f}",
            _shown(load.batch_rows, ".1f"),
            _shown(load.queue_ms, ".1f"),
            _shown(load.request_ms, ".1f"),
            _shown(load.p50_seconds, "g"),
            _shown(load.p99_seconds, "g"),
            f"{load.waiting:.0f}",
            f"{load.running:.0f}",
            f"{load.tokens:.0f}",
            _shown(load.kv_cache, ".0%"),
        )
        for load in models
    ]
    text = text_table(_HEAD, rows)
    if port is not None:
        errors = ", ".join(f"{kind} {rate:.1f}/s" for kind, rate in port.errors.items()) or "none"
        text += f"\n\nOpenAI port: {port.requests:.1f} req/s, {port.in_flight:.0f} open; errors: {errors}"
    return text


def _shown(value: float, form: str) -> str:
    return "-" if math.isnan(value) else "> 120" if math.isinf(value) else format(value, form)
