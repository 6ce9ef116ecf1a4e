"""A model's process that is stopped, as by SIGSTOP, goes on where it was; one that stays stopped is replaced."""

from __future__ import annotations

import http.client
import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from language_models import write_export
from served import family, gone, post, start, supervised, wait_until

from deploykit.runtime.serving_settings import ServingSettings
from deploykit.tasks.text_generation.chat_template import CHATML
from deploykit.triton.repository import package
from deploykit.triton.server import TritonServer

CALLERS = 200
TEXTS = {
    "lm": {"text_input": "list the file", "parameters": {"max_tokens": 30, "ignore_eos": True}},
    "tiny": {"TEXT": "w1 w2 w3"},
}
pytestmark = pytest.mark.parametrize("model", ["lm", "tiny"])


@pytest.fixture(scope="module")
def repository(tiny_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    repository = tmp_path_factory.mktemp("repository")
    export = write_export(tmp_path_factory.mktemp("lm") / "export", template=CHATML, max_position_embeddings=256)
    package(export, "lm", repository, settings=ServingSettings(threads=1, max_rows=8, max_queue_size=2 * CALLERS))
    package(tiny_export, "tiny", repository, engine="onnxruntime", precision="fp32")
    return repository


def _ask(server: TritonServer, model: str) -> tuple[int, Any]:
    return post(server, TEXTS[model], model, "generate")


def _processes(server: TritonServer, model: str) -> list[psutil.Process]:
    found = [process for process in family(server)[1:] if not gone(process)]
    return [process for process in found if f"/{model}/1/" in " ".join(process.cmdline())]


def test_a_model_that_is_stopped_and_continued_answers_all_who_wait(model: str, repository: Path) -> None:
    """Without the guard, Triton 2.51 takes it for dead after 1 s, and frees what it still reads and writes then."""
    with start(repository) as server, ThreadPoolExecutor(CALLERS) as pool:
        expected = _ask(server, model)
        processes = family(server)
        stopped = _processes(server, model)[0]
        for _ in range(2):
            asked = [pool.submit(_ask, server, model) for _ in range(CALLERS)]
            time.sleep(0.3)
            stopped.send_signal(signal.SIGSTOP)
            asked += [pool.submit(_ask, server, model) for _ in range(CALLERS)]
            time.sleep(3.0)
            stopped.send_signal(signal.SIGCONT)
            assert [one.result(60) for one in asked] == len(asked) * [expected]
        assert family(server) == processes


def test_a_model_that_stays_stopped_is_replaced(model: str, repository: Path) -> None:
    with start(repository) as server, supervised(server), ThreadPoolExecutor(CALLERS) as pool:
        expected = _ask(server, model)
        stopped = _processes(server, model)[0]
        asked = [pool.submit(_ask, server, model) for _ in range(CALLERS)]
        time.sleep(0.1)
        stopped.send_signal(signal.SIGSTOP)
        begun = time.monotonic()
        assert wait_until(lambda: gone(stopped) and _answers(server, model, expected), 30)
        print(json.dumps({"fault": f"SIGSTOP of {model}", "seconds": round(time.monotonic() - begun, 2)}))
        for one in asked:
            if one.exception(30) is None:
                assert one.result() == expected or one.result()[0] == 503
            else:
                assert isinstance(one.exception(), (ConnectionError, http.client.HTTPException))


def _answers(server: TritonServer, model: str, expected: tuple[int, Any]) -> bool:
    try:
        return _ask(server, model) == expected
    except (OSError, http.client.HTTPException):
        return False
