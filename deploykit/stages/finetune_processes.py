"""Fine-tune in several processes that this one starts, as ``torchrun`` would. They end together."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from deploykit.artifacts import load_manifest
from deploykit.errors import DeploykitError, Interrupted, UsageError
from deploykit.hardware import available_cpus
from deploykit.signals import handled, unhandled
from deploykit.stages.finetune import Finetuned
from deploykit.training import processes
from deploykit.training.options import FinetuneOptions, write_toml
from deploykit.training.rows import Say

_POLL_S = 0.1
_GRACE_S = 2.0
"""Seconds for the first process to report its own error after another has ended, and to end on request."""
_MOST = 1024
_PR_SET_PDEATHSIG = 1


def check_processes(count: int, *, searches: bool, repeats: bool) -> None:
    """Raise UsageError if ``--processes``, or a launcher that started this process, does not fit the options:
    ``searches`` and ``repeats`` (``--folds``, ``--learning-curve``) train many runs, each in one process."""
    if not 1 <= count <= _MOST:
        raise UsageError(f"--processes is {count}", f"give a number from 1 to {_MOST:,}")
    if searches and max(count, processes.count()) > 1:
        raise UsageError(
            "--search trains each run in one process",
            "leave out --processes or the launcher, and start the same command several times: they share the runs",
        )
    if repeats and max(count, processes.count()) > 1:
        raise UsageError(
            "--folds and --learning-curve train each part in one process",
            "leave out --processes or the launcher",
        )
    if count == 1:
        return
    if processes.count() > 1:
        raise UsageError("--processes starts processes, and this one was started with others", "leave it out")


def finetune_together(
    options: FinetuneOptions, count: int, out: Path, *, force: bool = False, restart: bool = False, say: Say
) -> Finetuned:
    """Fine-tune as ``finetune`` does, in ``count`` processes that share each batch.

    Raises DeploykitError with the error of the process that failed first; the others are ended. On Ctrl-C or SIGTERM all
    end, and the same command continues from the last checkpoint.
    """
    options.check()
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "finetune.toml"
        write_toml(options, config)
        flags = [*(["--force"] if force else []), *(["--restart"] if restart else [])]
        words = [sys.executable, "-m", "deploykit", "finetune", "--config", str(config), "--output-dir", str(out),
                 "--json", *flags]  # fmt: skip
        record = _run(words, count, Path(folder), say)
    return Finetuned(out, load_manifest(out, "checkpoint", verify=False), reused=record["reused"])


def _run(words: Sequence[str], count: int, folder: Path, say: Say) -> dict[str, Any]:
    """Run the command in ``count`` processes. Returns the result of the first."""
    started: list[subprocess.Popen[str]] = []
    with handled(_interrupt, unhandled()):
        try:
            environment = _environment(count)
            for rank in range(count):
                files = [(folder / f"{rank}.{name}").open("w") for name in ("out", "err")]
                started.append(
                    subprocess.Popen(
                        words, text=True, stdin=subprocess.DEVNULL, stdout=files[0],
                        stderr=files[1] if rank else subprocess.PIPE, start_new_session=True, preexec_fn=_end_with_parent,
                        env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    )
                )  # fmt: skip
                for file in files:
                    file.close()
            progress = threading.Thread(target=_tell, args=(started[0].stderr, say), daemon=True)
            progress.start()
            _wait(started, folder)
        finally:
            _end(started)
        progress.join()
    found: dict[str, Any] = json.loads((folder / "0.out").read_text())
    return found


def _environment(count: int) -> dict[str, str]:
    """Return the variables that ``torchrun`` sets for all processes, and an equal share of the CPUs for each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threads = str(max(1, available_cpus() // count))
    return {"OMP_NUM_THREADS": threads, "TORCH_CPP_LOG_LEVEL": "ERROR", **os.environ, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip


def _wait(started: Sequence[subprocess.Popen[str]], folder: Path) -> None:
    """Wait until all have ended. Raises DeploykitError as soon as one fails."""
    while True:
        codes = [process.poll() for process in started]
        if any(codes):
            with suppress(subprocess.TimeoutExpired):
                started[0].wait(_GRACE_S)
            codes = [process.poll() for process in started]
            # If a signal ended one process, the others fail after it. Every process finds errors in the options or rows:
            # the first one reports them.
            killed = [rank for rank, code in enumerate(codes) if code and code < 0]
            rank = [*killed, *(rank for rank, code in enumerate(codes) if code)][0]
            raise _error(rank, len(started), started[rank].returncode, folder)
        if all(code == 0 for code in codes):
            return
        time.sleep(_POLL_S)


def _error(rank: int, count: int, code: int, folder: Path) -> DeploykitError:
    """Return the error that a process has reported, or an error that it has ended."""
    with suppress(ValueError, LookupError):
        told: Mapping[str, Any] = json.loads((folder / f"{rank}.out").read_text().splitlines()[-1])["error"]
        return (UsageError if code == UsageError.exit_code else DeploykitError)(told["message"], told["remedy"])
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return DeploykitError(
        f"process {rank + 1} of {count} {how}; the others were ended too",
        "start the same command again: it continues from the last checkpoint; if memory ran out, give a smaller batch",
    )


def _tell(lines: IO[str] | None, say: Say) -> None:
    """Forward the progress of the first process, but not its error, which is raised."""
    assert lines is not None
    for line in lines:
        if not line.startswith(("error: ", "remedy: ")):
            say(line.rstrip("\n"))


def _end(started: Sequence[subprocess.Popen[str]]) -> None:
    for process in started:
        process.terminate()
    for process in started:
        try:
            process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _interrupt(number: int, _: Any) -> None:
    raise Interrupted(
        "interrupted: the same command continues from the last checkpoint (--restart starts over)", number
    )


def _end_with_parent() -> None:
    """Make Linux end this process when its parent dies."""
    with suppress(AttributeError):  # another system
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
