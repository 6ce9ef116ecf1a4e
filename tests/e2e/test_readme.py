"""The commands of docs/ and README run as written, in the order of the pages."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import signal
import socket
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import psutil
import pytest
from language_models import write_checkpoint, write_rows
from paths import ROOT

from deploykit.tasks.text_generation.chat_template import CHATML

PAGES = re.findall(r"^  - .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
NOT_RUN = {
    "finetune .*": "trains for minutes; tests train smaller models with the same options",
    "export (nli-checkpoint|runs/a-int8|runs/student) .*": "of a checkpoint that is not trained here (see finetune)",
    "export runs/a .*--calib .*": "Engines runs the same, with TensorRT",
    "(calibrate|export) runs/lm .*": "Export does the same with a classifier; tests/unit/tasks/text_generation/test_calibration.py",
    "predict runs/pairs .*": "of a checkpoint that is not trained here (see finetune)",
    "predict exports/a .*s3:.*": "needs a bucket",
    "predict exports/a .*--ray.*": "starts Ray; tests/integration/test_ray.py",
    "predict (tweets|exports/ner) .*": "of a server that is not started here",
    "explain (exports/(a|squad|commands|fr)|runs/a --rows) .*": "of models that later pages make, or of 200 rows; tests/e2e/test_explain.py",
    "evaluate runs/best .*": "of a search that is not run here (see finetune)",
    "evaluate runs/a .*--report .*": "of rows with the user's own columns; tests/e2e/test_report.py",
    "evaluate ner .*": "tests/e2e/test_added_task.py",
    "(export|package) (runs|exports)/ner .*": "tests/e2e/test_added_task.py",
    "package EXPORT .*": "a template: the user fills in the names",
    "serve .*": "serves until Ctrl-C, on ports that are taken here",
    "tune .*": "searches for 10 minutes; tests/e2e/test_tune.py",
}
"""deploykit commands of indented blocks, without ``deploykit``, and why the test does not run them. Blocks of other programs
install packages, or are quoted by a test."""
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def _blocks(page: Path) -> list[tuple[str, str]]:
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def _docs_blocks() -> list[tuple[str, str]]:
    return [block for page in PAGES for block in _blocks(ROOT / "docs" / page)]


def test_the_readmes_commands_are_those_of_the_docs() -> None:
    """README's commands are in the docs too, so that they run only once."""
    run = {command for _, block in _docs_blocks() for command in _commands(block)}
    assert {command for _, block in _blocks(ROOT / "README.md") for command in _commands(block)} <= run


def test_every_command_that_is_not_run_has_a_reason() -> None:
    """Indented blocks are not run; ``test_options.py`` checks the names of their options."""
    shown = {
        command
        for page in PAGES
        for command in re.findall(
            r"^ {4}deploykit (.*)$", (ROOT / "docs" / page).read_text("utf-8").replace("\\\n", " "), re.MULTILINE
        )
    }
    unexplained = [command for command in shown if not any(re.fullmatch(known, command) for known in NOT_RUN)]
    assert unexplained == []
    assert [known for known in NOT_RUN if not any(re.fullmatch(known, command) for command in shown)] == []


def _commands(block: str) -> list[str]:
    return block.replace("\\\n", "").splitlines()


@pytest.mark.slow
@pytest.mark.timeout(1860)  # the commands of all pages
def test_every_block_of_the_docs_works(minilm: Path, tweets: Path, pairs: Path, tmp_path: Path) -> None:
    for port in (8000, 8001, 8002, 8010, 8011, 8012, 8020, 8021, 8022, 8030, 8031, 8032, 9000, 9030):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                pytest.skip(f"port {port}, which the docs use, is taken on this machine")
    (tmp_path / "minilm").symlink_to(minilm)
    rows = _write_some(tweets, tmp_path / "tweets.csv")
    head, *lines = pairs.read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "pairs.tsv").write_text("".join([head, *lines[::6]]), encoding="utf-8")
    write_checkpoint(tmp_path / "smollm2", template=CHATML)
    write_rows(tmp_path / "commands.jsonl")
    # Each command is shown with the second at which it begins. Servers end with the script, else it would not end.
    script = ["set -euo pipefail", "trap 'kill $(jobs -p) 2>/dev/null || true' EXIT", "PS4='[$SECONDS s] '; set -x"]
    for language, block in _docs_blocks():
        script.append(block if language == "bash" else f"python - <<'PYTHON'\n{block}PYTHON")
    # Wait by process id: the shell forgets a job that ends during another wait.
    script.append("servers=$(jobs -p); kill -INT %1 %2; wait $servers")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        ["bash", "-m", "-c", "\n".join(script)], cwd=tmp_path, env=environment, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=1800)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"the docs' commands did not end:\n{output[-3000:]}")
    finally:
        _end_session(process.pid)
    assert process.returncode == 0, output[-3000:]
    assert "Traceback" not in output
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == rows
    assert json.loads((tmp_path / "bench.json").read_text())["errors"] == 0
    assert (tmp_path / "out.txt").read_text().count("\n") == 3
    assert (tmp_path / "out.txt").read_text().split("\n")[1] == "", "an empty line stays empty"
    assert _sections(tmp_path / "bench.html") >= 4
    assert not list(tmp_path.rglob("*.partial")), "nothing half-written is left"


def _write_some(tweets: Path, out: Path) -> int:
    """Write every 50th tweet, 764 of them, because training and answering take minutes. Returns their number."""
    with tweets.open(encoding="latin-1", newline="") as source, out.open("w", encoding="latin-1", newline="") as target:
        head, *rows = csv.reader(source)
        csv.writer(target).writerows([head, *rows[::50]])
    return len(rows[::50])


def _end_session(leader: int) -> None:
    """End the processes that the commands left running, each in its own process group, and no other server."""
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            if os.getsid(process.pid) == leader:
                process.terminate()


def _sections(page: Path) -> int:
    """Return the number of plots on the page, and check that it loads nothing from a network."""
    plots = 0

    class Page(HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            nonlocal plots
            plots += tag == "svg"
            for name, value in attributes:
                assert name not in ("src", "href", "xlink:href") or str(value).startswith("#"), value

    Page().feed(page.read_text(encoding="utf-8"))
    return plots
