"""The embedded Triton, for the duration of a block."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from deploykit.api.model import Model, StrPath, load
from deploykit.errors import DeploykitError, ServerError

if TYPE_CHECKING:
    from deploykit.triton.server import TritonServer

log = logging.getLogger(__name__)


class Server:
    """The embedded Triton on a model repository, for the duration of the block.

    A model whose process dies is loaded again. A port of 0 takes a free one.

    Args:
        model_repository: Folder of packaged models.
        host: Address to listen on; "0.0.0.0" accepts connections from other machines.
        http_port: Port of HTTP; ``url`` is the address.
        grpc_port: Port of gRPC.
        metrics_port: Port of the Prometheus metrics.
        ready_timeout: Seconds to wait for all models to load.
        drain: Seconds to wait for requests in flight when stopping.
        log_file: Triton's own log. Default: a temporary file.
        require_signature: Public key (PEM) that each model's folder must be signed with.

    Raises:
        ArtifactError: A model is damaged, or not signed.
        ServerError: A port is taken, a model cannot be loaded, or the server ended unexpectedly.
    """

    def __init__(
        self,
        model_repository: StrPath = "model_repository",
        *,
        host: str = "127.0.0.1",
        http_port: int = 8000,
        grpc_port: int = 8001,
        metrics_port: int = 8002,
        ready_timeout: float = 60.0,
        drain: float = 30.0,
        log_file: StrPath | None = None,
        require_signature: StrPath | None = None,
    ) -> None:
        from deploykit.triton.server import TritonServer

        self._server: TritonServer = TritonServer(
            Path(model_repository), host=host, http_port=http_port, grpc_port=grpc_port, metrics_port=metrics_port,
            ready_timeout=ready_timeout, drain=drain, log_file=None if log_file is None else Path(log_file),
            require_signature=None if require_signature is None else Path(require_signature),
        )  # fmt: skip
        self._ending = threading.Event()
        self._supervisor: threading.Thread | None = None
        self._lost: DeploykitError | None = None
        self._loaded: list[Model] = []

    @property
    def url(self) -> str:
        """HTTP address of the running server."""
        return self._server.urls.http

    @property
    def grpc_url(self) -> str:
        """gRPC address of the running server, host:port."""
        return self._server.urls.grpc

    @property
    def metrics_url(self) -> str:
        """Address of the Prometheus metrics."""
        return self._server.urls.metrics

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the served models."""
        return self._server.models

    def load(self, name: str) -> Model:
        """Connect to one of the ``models``. The connection is closed when the block ends, or earlier."""
        model = load(name, url=self.url)
        self._loaded.append(model)
        return model

    def __enter__(self) -> Server:
        self._ending.clear()
        self._server.start()
        self._supervisor = threading.Thread(target=self._supervise, name="deploykit-supervisor", daemon=True)
        self._supervisor.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        while self._loaded:
            self._loaded.pop().close()
        self._ending.set()
        if self._supervisor is not None:
            self._supervisor.join()
        self._server.stop()
        if self._lost is not None and error is None:
            raise self._lost

    def _supervise(self) -> None:
        try:
            self._server.supervise(self._ending)
        except ServerError as error:
            log.error("%s", error)
            self._lost = error
