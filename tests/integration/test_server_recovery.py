"""A server whose processes are killed or told to stop answers again by itself."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import psutil
import pytest
from served import body, family, gone, outputs, post, start, supervised, wait_until

from deploykit.errors import ServerError
from deploykit.runtime.served import parse_url
from deploykit.tasks.classification.facts import Classification
from deploykit.tasks.classification.served import ServedClassifier
from deploykit.triton.repository import package
from deploykit.triton.server import TritonServer

LONG = 64 * ["w1 w2 w3 w4 " * 10_000]


@pytest.fixture(scope="module")
def repository(tiny_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    repository = tmp_path_factory.mktemp("repository")
    package(tiny_export, "tiny", repository, engine="onnxruntime", precision="fp32")
    return repository


@dataclass
class Supervised:
    server: TritonServer
    restarts: list[int]


@pytest.fixture(scope="module")
def running(repository: Path) -> Iterator[Supervised]:
    with start(repository, drain=2.0) as server, supervised(server) as restarts:
        yield Supervised(server, restarts)


@pytest.fixture
def fresh(running: Supervised) -> Supervised:
    """The server, as if it had run for long."""
    running.server._failures = 0
    running.restarts.clear()
    return running


def _refuses(server: TritonServer) -> bool:
    host, port = parse_url(server.urls.http)[0].split(":")
    try:
        socket.create_connection((host, int(port)), timeout=1.0).close()
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:  # it ended between the two packets of the handshake
        pass
    return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_triton_that_ends_is_started_again(fresh: Supervised, number: signal.Signals) -> None:
    server = fresh.server
    expected = outputs(post(server, body(["w1"]))[1])
    processes = family(server)
    os.kill(server.pid, number)
    assert wait_until(lambda: _refuses(server), 10), "clients must see at once that the server is away"
    assert wait_until(lambda: len(fresh.restarts) == 1, 20)
    assert outputs(post(server, body(["w1"]))[1]) == expected
    assert fresh.restarts == [server.pid]
    assert all(gone(process) for process in processes)


def test_clients_of_a_killed_server_get_their_answers_from_the_next_one(fresh: Supervised) -> None:
    with closing(ServedClassifier("tiny", fresh.server.urls.http)) as client, ThreadPoolExecutor(1) as pool:
        expected = client.scores(LONG[:1])
        answer = pool.submit(client.scores, LONG * 4)
        time.sleep(0.2)
        os.kill(fresh.server.pid, signal.SIGKILL)
        np.testing.assert_allclose(answer.result(timeout=60), np.repeat(expected, len(LONG * 4), axis=0), atol=1e-6)
    assert len(fresh.restarts) == 1


def test_clients_of_a_server_that_stays_away_get_an_error_not_silence(repository: Path) -> None:
    with start(repository) as server:
        clients = [ServedClassifier("tiny", server.urls.http, patience=patience) for patience in (0, 0.5)]
    for client in clients:
        with closing(client), pytest.raises(ServerError, match="no server answers"):
            client.scores(["w1"])


def test_a_request_that_ends_servers_is_not_sent_for_ever() -> None:
    """The first to read a request to the model closes the connection without an answer, as a server does that dies."""
    config = {"parameters": {}, "max_batch_size": 8}
    asked = []

    class Dying(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(config).encode())

        def do_POST(self) -> None:
            asked.append(self.path)
            self.close_connection = True

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Dying) as server, ThreadPoolExecutor(1) as pool:
        pool.submit(server.serve_forever)
        task = Classification(("bad", "good"), max_length=8, pad_token_id=0)
        with patch.object(ServedClassifier, "_read_task", lambda *_: task):
            client = ServedClassifier("tiny", f"127.0.0.1:{server.server_port}")
        with closing(client), pytest.raises(ServerError, match="no server answers"):
            client.scores(["w1"])
        server.shutdown()
    assert len(asked) == 2


def test_a_server_that_cannot_start_is_tried_again_with_growing_pauses(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    with start(repository, ready_timeout=5.0) as server:
        before = server._pause_before_restart
        monkeypatch.setattr(server, "_pause_before_restart", lambda how: pauses.append(before(how)) or 0.0)
        os.kill(server.pid, signal.SIGKILL)
        assert wait_until(lambda: _refuses(server), 10)
        with socket.create_server(("127.0.0.1", server._ports["grpc"])) as other, supervised(server) as pids:
            assert wait_until(lambda: len(pauses) >= 3, 30)
            other.close()
            assert wait_until(lambda: len(pids) == 1, 20)
    assert pauses == [min(2.0**i - 1, 30.0) for i in range(len(pauses))]


def test_no_request_is_answered_wrong_or_500_while_model_processes_are_killed(fresh: Supervised) -> None:
    server = fresh.server
    expected = outputs(post(server, body(["w1 w2"]))[1])
    stop = threading.Event()
    lost: list[Exception] = []

    def ask() -> list[tuple[int, Any]]:
        found = []
        while not stop.is_set():
            try:
                found.append(post(server, body(["w1 w2"])))
            except (OSError, http.client.HTTPException) as error:
                lost.append(error)
                time.sleep(0.1)
        return found

    def kill_a_model_process() -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):  # Triton has ended, and is started again
            for process in family(server)[1:2]:
                process.kill()
                return True
        return False

    with ThreadPoolExecutor(16) as pool:
        clients = [pool.submit(ask) for _ in range(16)]
        for _ in range(2):
            time.sleep(0.5)
            assert wait_until(kill_a_model_process, 20), "the model's processes are there again"
            time.sleep(2.0)
        stop.set()
        answers = [answer for client in clients for answer in client.result()]
    assert {status for status, _ in answers} <= {200, 503}, [
        answer for answer in answers if answer[0] not in (200, 503)
    ][:3]
    assert all(outputs(answer) == expected for status, answer in answers if status == 200)
    # A process that died with a lock of the shared memory ended Triton, about once in a hundred kills.
    assert not lost or wait_until(lambda: len(fresh.restarts) > 0, 30), lost[:3]


def _answers(server: TritonServer) -> bool:
    with contextlib.suppress(OSError, http.client.HTTPException):
        return post(server, body(["w1"]), timeout=2.0)[0] == 200
    return False


def _kill_the_next_process(server: TritonServer, known: set[psutil.Process]) -> None:
    """Kill a model's process as soon as there is another one, before it has told Triton that it lives."""
    for _ in range(20_000):
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(server.pid).children():
                if process not in known and process.name().startswith(
                    "triton_python"
                ):  # it is no copy of Triton any more
                    process.kill()
                    return
        time.sleep(0.001)
    raise AssertionError("no other process was started")


def test_a_process_that_dies_while_it_starts_keeps_no_request_waiting(fresh: Supervised) -> None:
    """Triton 2.51 would wait for its first message for ever."""
    server = fresh.server
    expected = outputs(post(server, body(["w1"]))[1])
    known = set(psutil.Process(server.pid).children())
    for process in known:
        process.kill()
    _kill_the_next_process(server, known)
    assert wait_until(lambda: _answers(server), 40)
    assert outputs(post(server, body(["w1"]))[1]) == expected


def test_a_start_whose_process_dies_is_tried_again(fresh: Supervised) -> None:
    server, pid = fresh.server, fresh.server.pid
    os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: server.pid != pid, 20)
    _kill_the_next_process(server, set())
    assert wait_until(lambda: _answers(server), 40)


def test_serve_notices_at_once_that_triton_ended_while_it_asks_it_to_unload(repository: Path) -> None:
    """Triton 2.51 ends where a model's process died with a lock. The other process keeps Triton's connections open."""
    with start(repository) as server, ThreadPoolExecutor(1) as pool:
        triton = server._running()
        os.kill(triton.pid, signal.SIGSTOP)
        asked = pool.submit(triton.control, "tiny", "unload", timeout=60.0)
        time.sleep(0.5)
        os.kill(triton.pid, signal.SIGKILL)
        assert isinstance(asked.exception(5.0), ConnectionResetError)


def test_a_process_of_a_replaced_model_that_does_not_end_is_killed(fresh: Supervised) -> None:
    """Stopped while it answers, it would keep its memory, and its clients would wait, for ever."""
    server = fresh.server
    assert wait_until(lambda: len([one for one in family(server) if not gone(one)]) == 3, 30)
    with ThreadPoolExecutor(8) as pool:
        killed, stopped = [one for one in family(server) if not gone(one)][1:]
        asked = [pool.submit(post, server, body(LONG)) for _ in range(8)]
        time.sleep(0.5)
        stopped.send_signal(signal.SIGSTOP)
        killed.kill()
        assert wait_until(lambda: gone(stopped), 60)
        for answer in asked:
            if answer.exception(60) is None:
                assert answer.result()[0] in (200, 503)
            else:  # one that died with a lock of the shared memory ended Triton
                assert isinstance(answer.exception(), (OSError, http.client.HTTPException))
    assert wait_until(lambda: len([one for one in family(server) if not gone(one)]) == 3, 30)
    assert post(server, body(["w1"]))[0] == 200


def test_serve_writes_the_new_process_to_the_ready_file(repository: Path, tmp_path: Path) -> None:
    ready = tmp_path / "ready.json"
    ports = [word for name in ("http", "grpc", "metrics") for word in (f"--{name}-port", "0")]
    command = [sys.executable, "-m", "deploykit", "serve", "--model-repository", str(repository), *ports]
    with subprocess.Popen(
        [*command, "--ready-file", str(ready)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as run:
        try:
            assert wait_until(ready.exists, 60)
            first = json.loads(ready.read_text())["pid"]
            os.kill(first, signal.SIGKILL)
            assert wait_until(lambda: json.loads(ready.read_text())["pid"] != first, 20)
            assert psutil.pid_exists(json.loads(ready.read_text())["pid"])
        finally:
            run.send_signal(signal.SIGTERM)
            _, errors = run.communicate(timeout=60)
    assert run.returncode == 0
    assert b"Triton ended (killed by SIGKILL); starting it again" in errors
    assert b"Traceback" not in errors
    assert not ready.exists()
