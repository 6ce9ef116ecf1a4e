"""Run the steps of the GPU check, each in its own process with a time limit, and record the results.

The record is written after every step, so that an interrupted run keeps its results.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

STEPS: Mapping[str, int] = {
    "doctor": 10,
    "tests": 40,
    "finetune": 85,
    "classify": 40,
    "translate": 30,
    "answer": 50,
    "generate": 65,
    "export": 20,
    "tensorrt": 10,
}
"""Step -> the seconds that it may take on a GPU; 350 in all."""
SCHEMA = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    parser.add_argument("--payload", type=Path, required=True, help="what unpack.sh made")
    parser.add_argument("--out", type=Path, required=True, help="folder of the record and the log")
    parser.add_argument("--step", choices=list(STEPS), action="append", help="only this one; repeatable")
    parser.add_argument("--quick", action="store_true", help="a little of everything: what the tests run")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "device": options.device,
        "card": card(options.device),
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "steps": {},
    }
    started = time.monotonic()
    for name in options.step or STEPS:
        record["steps"][name] = run_step(name, options)
        record["seconds"] = round(time.monotonic() - started, 1)
        write(record, options.out / "gpu.json")
        print(f"{name}: {record['steps'][name]['status']} in {record['steps'][name]['seconds']} s", flush=True)
    if any(step["status"] != "ok" for step in record["steps"].values()):
        raise SystemExit(1)


def run_step(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return status (ok, failed, timed out), seconds, and the step's result or the end of its output."""
    words = [sys.executable, str(Path(__file__).with_name("steps.py")), name, "--device", options.device,
             "--payload", str(options.payload), "--work", str(options.out / "work")]  # fmt: skip
    result = options.out / f"{name}.json"
    result.unlink(missing_ok=True)
    started = time.monotonic()
    with (options.out / "log.txt").open("ab") as log:
        log.write(f"\n== {name}\n".encode())
        log.flush()
        begin = log.tell()
        process = subprocess.Popen(
            [*words, "--result", str(result), *(["--quick"] if options.quick else [])],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(STEPS[name] * (1 if options.device == "cuda" else 10))  # a CPU takes longer
            status = "failed" if process.returncode else "ok"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = "timed out"
    found: dict[str, Any] = {"status": status, "seconds": round(time.monotonic() - started, 1)}
    if result.is_file():  # also partial results of a step that timed out
        found["result"] = json.loads(result.read_text())
    if status != "ok":
        found["log"] = (options.out / "log.txt").read_bytes()[begin:][-2000:].decode(errors="replace")
    return found


def card(device: str) -> str:
    """Return the name of the GPU, or of the CPU."""
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    from deploykit.hardware import cpu_name

    return f"{cpu_name()} ({platform.machine()}, {os.cpu_count()} CPUs)"


def write(record: Mapping[str, Any], path: Path) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    main()
