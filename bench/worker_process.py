"""A contender in a process of its own, which is asked in lines of JSON."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from typing_extensions import Self

from deploykit.errors import DeploykitError


class WorkerProcess:
    """The program ``program`` of bench/, run by ``python``, from the start until ``close``.

    ``opened`` is its answer to ``job``, the first line that it reads. Raises DeploykitError if it cannot open or fails,
    with the last line that it printed.
    """

    def __init__(self, name: str, python: str, program: str, threads: int, job: Mapping[str, Any]) -> None:
        self.name, self._program = name, program
        self._printed = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [python, str(Path(__file__).with_name(program))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._printed, text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        try:
            self.opened: Mapping[str, Any] = self.ask(job)
        except DeploykitError:
            self.close()
            raise

    def ask(self, request: Mapping[str, Any]) -> Any:
        """Return the answer to a line."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._printed.seek(0)
            told = (self._printed.read().strip().splitlines() or [f"exit status {status}"])[-1]
            raise DeploykitError(f"{self.name}: {told}", f"run bench/{self._program} to see more")
        return json.loads(line)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._printed.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
