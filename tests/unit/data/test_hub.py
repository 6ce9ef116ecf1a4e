"""A hub that cannot be reached is told of at once, and a cache or offline mode keeps it from being asked."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from deploykit.data.hub import connection_fault
from deploykit.data.read import read_records
from deploykit.errors import ArtifactError, DataError
from deploykit.training.source import check_source

NOBODY = "http://127.0.0.1:1"


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A hub at a port on which nobody listens, and an empty cache."""
    monkeypatch.setattr(constants, "ENDPOINT", NOBODY)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))


def test_a_name_that_is_no_folder_is_refused_without_retries(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ArtifactError, match=f"org/name: is not a local folder.*{NOBODY} does not answer"):
        check_source("org/name")
    with pytest.raises(DataError, match=f"org/name: is not a file.*{NOBODY} does not answer"):
        list(read_records("org/name"))
    assert "Retrying" not in caplog.text


def test_a_cache_and_offline_mode_keep_the_hub_from_being_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "hub" / "models--org--name" / "snapshots").mkdir(parents=True)
    (tmp_path / "datasets" / "org___name").mkdir(parents=True)
    assert connection_fault("org/name") is None
    assert connection_fault("org/name", "dataset") is None
    assert connection_fault("org/other") is not None
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert connection_fault("org/other") is None


def test_a_hub_that_answers_is_left_to_its_client(monkeypatch: pytest.MonkeyPatch) -> None:
    class NotFound(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    with HTTPServer(("127.0.0.1", 0), NotFound) as server:
        threading.Thread(target=server.serve_forever).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert connection_fault("org/name") is None
        server.shutdown()
