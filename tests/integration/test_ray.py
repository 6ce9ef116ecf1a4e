"""Many rows on a local Ray cluster of two nodes, one of which is killed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import language_models
import pytest
import tiny_answerer
from click.testing import CliRunner

from deploykit.cli import main
from deploykit.ray_pool import RayPool, _Actor
from deploykit.signals import restored
from deploykit.tasks.answering import answer_source
from deploykit.tasks.opening import identity_of, open_predictor
from deploykit.tasks.text_generation.chat_template import CHATML

ray = pytest.importorskip("ray", reason="needs Ray: pip install 'deploykit[ray]'")
pytestmark = pytest.mark.filterwarnings("default")

WHERE = {"url": "", "engine": "onnxruntime", "precision": "fp32", "threads": 1}
OPTIONS = ("--engine", "onnxruntime", "--precision", "fp32", "--threads", "1")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    soon = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4}
    small = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False, "_system_config": soon}
    nodes = Cluster(initialize_head=True, head_node_args=small)
    with restored():  # Ray sets a handler of SIGTERM
        try:
            nodes.add_node(num_cpus=1, object_store_memory=80 * 2**20)
            ray.init(address=nodes.address, log_to_driver=False, logging_level="error")
            yield nodes
        finally:
            ray.shutdown()
            nodes.shutdown()


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files of rows, one of which has no text."""
    folder = tmp_path_factory.mktemp("rows")
    texts = [f"w{i % 200} w{i * 7 % 200}" for i in range(4000)]
    (folder / "a.csv").write_text("text\n" + "".join(f"{text}\n" for text in texts))
    (folder / "b").mkdir()
    lines = [json.dumps({"text": text}) for text in texts[:300]]
    lines[5] = '{"text": null}'
    (folder / "b" / "c.jsonl").write_text("\n".join(lines))
    (folder / "_SUCCESS").touch()
    return folder


def test_every_row_is_answered_once_and_in_order_though_a_node_is_killed(
    cluster: Any, rows: Path, tiny_export: Path, tmp_path: Path
) -> None:
    model = open_predictor(str(tiny_export), **WHERE)
    identity = identity_of(str(tiny_export), model)
    killed: list[int] = []

    def kill(done: int, of: int) -> None:
        if 0 < done < of and not killed:
            killed.append(done)
            cluster.remove_node(cluster.list_all_nodes()[-1], allow_graceful=False)

    def answer(out: Path, **how: Any) -> None:
        done = answer_source(model, str(rows / "a.csv"), out, identity=identity, columns={}, **how)
        assert (done.rows, done.errors) == (4000, 0)

    with RayPool("", str(tiny_export), WHERE, identity) as pool:
        answer(tmp_path / "ray.jsonl", spread=pool.spread, progress=kill)
    assert killed
    deadline = time.monotonic() + 60  # Ray counts a node as dead some seconds later
    while sum(node["Alive"] for node in ray.nodes()) != 1:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    answer(tmp_path / "alone.jsonl", progress=lambda *_: None)
    assert (tmp_path / "ray.jsonl").read_bytes() == (tmp_path / "alone.jsonl").read_bytes()


def test_a_folder_is_answered_file_by_file_and_taken_up_again(
    cluster: Any, rows: Path, tiny_export: Path, tmp_path: Path
) -> None:
    def run(*words: object) -> tuple[int, Any]:
        line = ["predict", tiny_export, "--input", rows, "--output", tmp_path / "out", "--json", *OPTIONS, *words]
        result = CliRunner().invoke(main, [str(word) for word in line])
        return result.exit_code, json.loads(result.stdout)

    code, record = run("--ray")
    assert (code, record["rows"], record["errors"], record["resumed"]) == (1, 4300, 1, 0)
    kept = (tmp_path / "out" / "a.csv.jsonl").stat().st_mtime_ns
    answers = [json.loads(line) for line in (tmp_path / "out" / "b" / "c.jsonl.jsonl").read_text().splitlines()]
    assert [number for number, row in enumerate(answers) if "error" in row] == [5]
    assert [row["origin"] for row in answers] == [f"c.jsonl:{number}" for number in range(1, 301)]

    (tmp_path / "out" / "b" / "c.jsonl.jsonl").unlink()
    code, record = run()  # without Ray
    assert (code, record["rows"], record["errors"], record["resumed"]) == (1, 4300, 1, 4000)
    assert (tmp_path / "out" / "a.csv.jsonl").stat().st_mtime_ns == kept
    code, record = run("--text-column", "nothere")
    assert code == 1
    assert "a.csv.jsonl: already exists, from another model, other input or other options" in record["error"]["message"]


def test_a_node_with_another_model_is_refused(tiny_export: Path) -> None:
    failed = _Actor(str(tiny_export), WHERE).open("another")
    assert failed is not None
    assert "is another model" in failed[0]


@pytest.mark.parametrize("task", ["translate", "answer", "generate"])
def test_other_tasks_are_spread_too(task: str, cluster: Any, tiny_translation: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]]
    if task == "translate":
        target, rows = tiny_translation, [{"source": f"Open {i} files"} for i in range(20)]
    elif task == "answer":
        target = tiny_answerer.write_export(tmp_path / "export")
        rows = [{"question": "which w1 ?", "context": f"w{i} w3 w1"} for i in range(20)]
    else:
        target = language_models.write_export(tmp_path / "export", template=CHATML)
        rows = [{"messages": [{"role": "user", "content": f"list file {i}"}]} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = []
    for name, where in (("spread", ["--ray"]), ("alone", [])):
        line = [
            task,
            target,
            "--input",
            tmp_path / "rows.jsonl",
            "--output",
            tmp_path / f"{name}.jsonl",
            "--threads",
            "1",
        ]
        line += ["--max-new-tokens", "4"] if task == "generate" else []
        result = CliRunner().invoke(main, [str(word) for word in (*line, *where)])
        assert result.exit_code == 0, result.output
        answers.append((tmp_path / f"{name}.jsonl").read_bytes())
    assert answers[0] == answers[1]
    assert len(answers[0].splitlines()) == len(rows)
