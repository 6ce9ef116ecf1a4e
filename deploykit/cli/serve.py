from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from typing import Any

import click

from deploykit.cli.common import MODEL_REPOSITORY, Result, deploykit_command, say
from deploykit.errors import UsageError


@deploykit_command(help="Serve a model repository with the embedded Triton, until Ctrl-C.")
@MODEL_REPOSITORY
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on; 0.0.0.0 accepts connections from other machines.",
)
@click.option(
    "--http-port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="HTTP port; 0: a free one."
)
@click.option("--grpc-port", type=click.IntRange(0, 65535), default=8001, show_default=True, help="gRPC port.")
@click.option("--metrics-port", type=click.IntRange(0, 65535), default=8002, show_default=True, help="Metrics port.")
@click.option(
    "--ready-timeout", type=float, default=60.0, show_default=True, help="Seconds to wait for the models to load."
)
@click.option(
    "--drain", type=float, default=30.0, show_default=True, help="Seconds to wait for requests in flight when stopping."
)
@click.option("--log-file", type=click.Path(path_type=Path), help="Triton's own log (default: a temporary file).")
@click.option("--verbose", is_flag=True, help="Write a verbose Triton log.")
@click.option(
    "--ready-file",
    type=click.Path(path_type=Path),
    help="File to write the addresses to, as JSON, once the server is ready.",
)
def command(*, repository: Path, ready_file: Path | None, ready_timeout: float, drain: float, **options: Any) -> Result:
    from deploykit.artifacts import new_file
    from deploykit.triton.server import TritonServer

    if ready_timeout <= 0 or drain < 0:
        raise UsageError("--ready-timeout must be above 0 and --drain at least 0", "give seconds")
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    server = TritonServer(repository, ready_timeout=ready_timeout, drain=drain, **options)
    say(f"starting Triton on {repository}")
    with server:
        for note in server.notes:
            say(note)
        record = {"models": list(server.models), **server.urls.__dict__, "pid": server.pid}
        say(
            f"ready: {', '.join(server.models)}\n"
            f"  HTTP     {server.urls.http}\n  gRPC     {server.urls.grpc}\n  metrics  {server.urls.metrics}\n"
            "stop with Ctrl-C"
        )
        if ready_file is not None:
            with new_file(ready_file) as file:
                file.write_text(json.dumps(record))
        try:
            server.supervise(stop)
        finally:
            say("waiting for requests in flight")
            if ready_file is not None:
                ready_file.unlink(missing_ok=True)
    return record, "stopped"
