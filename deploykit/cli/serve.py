from __future__ import annotations

import contextlib
import importlib.util
import json
import shlex
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from deploykit.cli_parts.command import RecordedCommand, Result, deploykit_command, say
from deploykit.cli_parts.shared_options import MODEL_REPOSITORY, REQUIRE_SIGNATURE
from deploykit.errors import MissingDependencyError, UsageError
from deploykit.runtime.serving_settings import API_KEY_VARIABLE
from deploykit.signals import ending, handled

if TYPE_CHECKING:
    from deploykit.openai.calls import AccessLog
    from deploykit.openai.certificate import Certificate
    from deploykit.openai.limits import Keys
    from deploykit.openai.metrics import PortMetrics
    from deploykit.triton.server import TritonServer

_OPENAI_OPTIONS = (
    "api_keys", "api_key_file", "limits", "ssl_certfile", "ssl_keyfile", "access_log", "access_log_texts", "triton_routes",
)  # fmt: skip


@deploykit_command(cls=RecordedCommand, help="Serve a model repository with the embedded Triton, until Ctrl-C.")
@MODEL_REPOSITORY
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on; 0.0.0.0 accepts connections from other machines.",
)
@click.option(
    "--http-port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="HTTP port; 0: a free port."
)
@click.option("--grpc-port", type=click.IntRange(0, 65535), default=8001, show_default=True, help="gRPC port.")
@click.option("--metrics-port", type=click.IntRange(0, 65535), default=8002, show_default=True, help="Metrics port.")
@click.option(
    "--openai-port",
    type=click.IntRange(0, 65535),
    help="Port for OpenAI's API, such as 9000; 0: a free port (default: no OpenAI port).",
)
@click.option(
    "--api-key",
    "api_keys",
    multiple=True,
    envvar=API_KEY_VARIABLE,
    show_envvar=True,
    metavar="KEY",
    help="Key that requests to the OpenAI port must have; may be given several times (default: none is needed).",
)
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File of keys, one NAME:SHA256[:LIMITS] per line; it is read again when it changes.",
)
@click.option(
    "--limits",
    default="",
    metavar="NAME=VALUE,...",
    help="Limits for each caller of the OpenAI port: max_body_bytes (default 8388608), max_rows, max_tokens, timeout (seconds), max_concurrent.",
)
@click.option(
    "--ssl-certfile",
    type=click.Path(path_type=Path),
    help="Certificate chain of the OpenAI port, PEM; it then has TLS.",
)
@click.option("--ssl-keyfile", type=click.Path(path_type=Path), help="Private key of the certificate, PEM.")
@click.option(
    "--access-log",
    type=click.Path(path_type=Path, dir_okay=False, allow_dash=True),
    help="File for a JSON line about each request to the OpenAI port, without its text; -: stderr.",
)
@click.option(
    "--access-log-texts",
    is_flag=True,
    help="Write the bodies of requests and answers to the access log too, up to 1 MiB of each.",
)
@click.option(
    "--triton-routes",
    is_flag=True,
    help="Answer Triton's HTTP API, /v2, on the OpenAI port too, with its keys, limits and TLS; Triton's own ports then listen on loopback only.",
)
@click.option(
    "--ready-timeout", type=float, default=60.0, show_default=True, help="Seconds to wait for the models to load."
)
@click.option(
    "--drain", type=float, default=30.0, show_default=True, help="Seconds to wait for requests in flight when stopping."
)
@REQUIRE_SIGNATURE
@click.option(
    "--otlp-endpoint",
    metavar="URL",
    help="Send traces to this OpenTelemetry collector, by OTLP over HTTP, such as http://localhost:4318.",
)
@click.option("--log-file", type=click.Path(path_type=Path), help="Triton's own log (default: a temporary file).")
@click.option("--verbose", is_flag=True, help="Write a verbose Triton log.")
@click.option(
    "--ready-file",
    type=click.Path(path_type=Path),
    help="File to write the addresses to, as JSON, once the server is ready.",
)
@click.option(
    "--print-unit",
    is_flag=True,
    help="Do not serve: print a systemd unit that serves with the other options, and restarts the server when it ends.",
)
def command(
    *,
    repository: Path,
    host: str,
    openai_port: int | None,
    ready_file: Path | None,
    ready_timeout: float,
    drain: float,
    otlp_endpoint: str | None,
    print_unit: bool,
    **options: Any,
) -> Result:
    from deploykit.artifacts import new_file
    from deploykit.triton.preflight import listen, resolve
    from deploykit.triton.server import TritonServer

    if ready_timeout <= 0 or drain < 0:
        raise UsageError("--ready-timeout must be above 0 and --drain at least 0", "give seconds")
    if print_unit:
        if click.get_current_context().get_parameter_source("api_keys") == ParameterSource.COMMANDLINE:
            raise UsageError("a unit with --api-key would show the key to all users", "give --api-key-file")
        from deploykit.triton.service_unit import service_unit

        words = shlex.split(RecordedCommand.command_line())[2:]
        unit = service_unit([word for word in words if word != "--print-unit"], Path.cwd(), drain)
        return {"unit": unit}, unit
    traces = None
    if otlp_endpoint is not None:
        from deploykit.runtime.tracing import tracer_provider

        traces = tracer_provider(otlp_endpoint, "deploykit")
    of_openai_port = {name: options.pop(name) for name in _OPENAI_OPTIONS}
    if openai_port is None:
        _refuse_openai_options()
        front = None
    else:
        front = _front(**of_openai_port)
    stop = threading.Event()
    listener = None if openai_port is None else listen("openai", resolve(host), openai_port)
    own_host = "127.0.0.1" if front is not None and front.triton_routes else host
    server = TritonServer(
        repository, host=own_host, ready_timeout=ready_timeout, drain=drain, otlp_endpoint=otlp_endpoint,
        while_loading=_import_front if front else lambda: None, **options,
    )  # fmt: skip
    say(f"starting Triton on {repository}")
    with handled(lambda *_: stop.set(), ending()), server, _openai(server, listener, front, traces) as openai:
        for note in server.notes:
            say(note)
        say(
            f"ready: {', '.join(server.models)}\n"
            f"  HTTP     {server.urls.http}\n  gRPC     {server.urls.grpc}\n  metrics  {server.urls.metrics}\n"
            f"{''.join(f'  OpenAI   {url}' + chr(10) for url in openai.values())}"
            "stop with Ctrl-C"
        )

        def write_ready_file() -> None:
            if ready_file is not None:
                with new_file(ready_file) as file:
                    file.write_text(json.dumps({**record, "pid": server.pid}))

        def restarted() -> None:
            write_ready_file()
            if front is not None:
                front.metrics.triton_restarts.inc()

        record = {"models": list(server.models), **server.urls.__dict__, **openai, "pid": server.pid}
        write_ready_file()
        try:
            server.supervise(stop, restarted=restarted)
        finally:
            if ready_file is not None:
                ready_file.unlink(missing_ok=True)
            say("waiting for requests in flight")  # fails where the terminal was closed
    return record, "stopped"


@dataclass(frozen=True)
class _Front:
    """How the OpenAI port admits requests."""

    keys: Keys
    certificate: Certificate | None
    access_log: AccessLog | None
    triton_routes: bool

    @cached_property
    def metrics(self) -> PortMetrics:
        from deploykit.openai.metrics import PortMetrics

        return PortMetrics()


def _refuse_openai_options() -> None:
    """Raise UsageError for an option of the OpenAI port on the command line."""
    context = click.get_current_context()
    for name in _OPENAI_OPTIONS:
        if context.get_parameter_source(name) == ParameterSource.COMMANDLINE:
            option = next(one.opts[0] for one in context.command.params if one.name == name)
            raise UsageError(f"{option} is for the OpenAI port", "give --openai-port too, or leave it out")


def _front(
    *,
    api_keys: tuple[str, ...],
    api_key_file: Path | None,
    limits: str,
    ssl_certfile: Path | None,
    ssl_keyfile: Path | None,
    access_log: Path | None,
    access_log_texts: bool,
    triton_routes: bool,
) -> _Front:
    """Check the options of the OpenAI port. Raises UsageError, DataError or MissingDependencyError."""
    if not all(map(importlib.util.find_spec, ("fastapi", "prometheus_client", "uvicorn"))):
        from deploykit.triton.preflight import SERVE_EXTRA

        raise MissingDependencyError(
            "FastAPI, prometheus-client or uvicorn, which --openai-port needs, is not installed", SERVE_EXTRA
        )
    from deploykit.openai.calls import AccessLog
    from deploykit.openai.certificate import Certificate
    from deploykit.openai.limits import Keys, Limits

    if not all(key.isascii() and key.isprintable() and key == key.strip() and key for key in api_keys):
        raise UsageError(
            "an API key is empty, begins or ends with white space, or has characters other than ASCII", "give another"
        )
    if (ssl_certfile is None) != (ssl_keyfile is None):
        raise UsageError("--ssl-certfile and --ssl-keyfile go together", "give both")
    if access_log_texts and access_log is None:
        raise UsageError("--access-log-texts is for the access log", "give --access-log too, or leave it out")
    certificate = Certificate(ssl_certfile, ssl_keyfile) if ssl_certfile and ssl_keyfile else None
    keys = Keys(api_keys, api_key_file, Limits().replaced(limits))
    return _Front(
        keys, certificate, AccessLog(access_log, texts=access_log_texts) if access_log else None, triton_routes
    )


def _import_front() -> None:
    """Import the code of the OpenAI port. It takes as long as Triton's start, so both run at the same time."""
    from deploykit.openai import app, server, triton_generator, triton_routes  # noqa: F401


@contextlib.contextmanager
def _openai(
    server: TritonServer, listener: socket.socket | None, front: _Front | None, traces: Any
) -> Iterator[dict[str, str]]:
    """Serve OpenAI's API on ``listener``, if there is one. Yields its address as ``openai``.

    Its open requests and then Triton's share the time to drain.
    """
    if listener is None or front is None:
        yield {}
        return
    from deploykit.openai.app import create_app
    from deploykit.openai.server import OpenAIServer
    from deploykit.openai.triton_generator import TritonGenerator
    from deploykit.openai.triton_routes import TritonRoutes
    from deploykit.tasks.opening import open_served

    if front.keys.needed and not server.urls.http.startswith("http://127."):
        say("note: only the OpenAI port needs the key; Triton's own ports answer anyone who reaches them")
    if front.keys.needed and front.certificate is None and not listener.getsockname()[0].startswith("127."):
        say("note: keys are sent in the clear without --ssl-certfile")
    generating = [name for name, facts in server.tasks.items() if facts.graph_kind == "decoder"]
    app = create_app(
        server.tasks,
        TritonGenerator(server.urls.grpc),
        lambda name: open_served(name, server.urls.http),
        created=int(time.time()),
        metrics_url=server.urls.metrics,
        keys=front.keys,
        triton=TritonRoutes(server.urls.http, server.models, generating) if front.triton_routes else None,
        metrics=front.metrics,
        access_log=front.access_log,
        traces=traces,
    )
    until = 0.0
    try:
        with OpenAIServer(app, listener, drain=server.drain, certificate=front.certificate) as openai:
            try:
                yield {"openai": openai.url}
            finally:
                until = time.monotonic() + server.drain
    finally:
        server.drain = max(0.0, until - time.monotonic())
