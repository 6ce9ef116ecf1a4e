"""A TCP proxy whose new connections go where it is told."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
from collections.abc import Iterator


class SwitchedProxy(socketserver.ThreadingTCPServer):
    """Passes each connection to the ``address`` of the moment, host:port, until both sides have closed it."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, address: str) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.address = address
        self.own_address = f"127.0.0.1:{self.server_address[1]}"


class _Connection(socketserver.BaseRequestHandler):
    server: SwitchedProxy

    def handle(self) -> None:
        host, port = self.server.address.split(":")
        with socket.create_connection((host, int(port))) as server:
            back = threading.Thread(target=_copy, args=(server, self.request))
            back.start()
            _copy(self.request, server)
            back.join()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while part := source.recv(1 << 16):
            target.sendall(part)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def switched_proxy(address: str) -> Iterator[SwitchedProxy]:
    with SwitchedProxy(address) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
            thread.join()
