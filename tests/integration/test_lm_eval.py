"""lm-evaluation-harness measures a served model through /v1/completions, in a virtual environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from language_models import write_export
from served import start

from deploykit.artifacts import load_manifest
from deploykit.openai.app import create_app
from deploykit.openai.server import OpenAIServer
from deploykit.openai.triton_generator import TritonGenerator
from deploykit.runtime.serving_settings import ServingSettings
from deploykit.tasks.opening import open_graph, open_served
from deploykit.tasks.text_generation.chat_template import CHATML
from deploykit.tasks.text_generation.encode import EncodedRow
from deploykit.tasks.text_generation.generator import LocalGenerator
from deploykit.triton.preflight import listen
from deploykit.triton.repository import package

LM_EVAL = Path(os.environ.get("LMEVAL_VENV", "/tmp/deploykit-lmeval")) / "bin" / "lm_eval"
pytestmark = pytest.mark.skipif(
    not LM_EVAL.is_file(), reason=f"{LM_EVAL} is missing: make interop installs lm-eval in an environment of its own"
)

QUESTIONS: list[dict[str, Any]] = [
    {"question": f"{deed} the {thing}", "choices": ["ls -f", "rm -d", "cat -l ~", "cp"], "answer": i % 4}
    for i, (deed, thing) in enumerate((d, t) for d in ("list", "delete", "show", "copy") for t in ("file", "log"))
]
TASK = {
    "task": "commands",
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_export(tmp_path_factory.mktemp("lm") / "export", template=CHATML)


@pytest.fixture(scope="module")
def url(export: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    repository = tmp_path_factory.mktemp("repository")
    package(export, "lm", repository, settings=ServingSettings(threads=1, max_rows=8))
    with start(repository) as server:
        models = TritonGenerator(server.urls.grpc)
        app = create_app(server.tasks, models, lambda name: open_served(name, server.urls.http), created=1)
        with OpenAIServer(app, listen("openai", "127.0.0.1", 0), drain=5.0) as opened:
            yield opened.url


@pytest.mark.parametrize("tokenized_requests", [True, False])
def test_a_multiple_choice_task_gives_the_scores_of_the_model_in_process(
    export: Path, url: str, tokenized_requests: bool, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (tmp_path / "tasks").mkdir()
    task = {**TASK, "dataset_kwargs": {"data_files": {"test": str(rows)}}}
    (tmp_path / "tasks" / "commands.yaml").write_text(json.dumps(task))  # JSON is YAML
    settings = {"model": "lm", "base_url": f"{url}/completions", "tokenizer": export, "max_length": 256,
                "tokenized_requests": tokenized_requests}  # fmt: skip
    subprocess.run(
        [LM_EVAL, "--model", "local-completions", "--tasks", "commands", "--include_path", tmp_path / "tasks",
         "--model_args", ",".join(f"{name}={value}" for name, value in settings.items()), "--batch_size", "4",
         "--output_path", tmp_path / "out", "--log_samples"],
        check=True, timeout=300,
        env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "none"},
    )  # fmt: skip
    [results] = (tmp_path / "out").rglob("results_*.json")
    [samples] = (tmp_path / "out").rglob("samples_commands_*.jsonl")
    found = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(found) == len(QUESTIONS)

    local = open_graph(export, load_manifest(export), threads=1)
    assert isinstance(local, LocalGenerator)
    right = 0
    for sample in found:
        row = sample["doc"]
        expected = [_score(local, row["question"], f" {choice}") for choice in row["choices"]]
        logprobs = [float(response[0][0]) for response in sample["resps"]]
        assert logprobs == pytest.approx([logprob for logprob, _ in expected], abs=1e-3)
        greedy = [str(response[0][1]) == "True" for response in sample["resps"]]
        assert greedy == [best for _, best in expected]
        right += int(np.argmax([logprob for logprob, _ in expected])) == row["answer"]
    accuracy = json.loads(results.read_text())["results"]["commands"]["acc,none"]
    assert accuracy == pytest.approx(right / len(QUESTIONS))


def _score(local: LocalGenerator, context: str, continuation: str) -> tuple[float, bool]:
    """Return the log-probability of ``continuation``, and whether greedy decoding would write it."""
    ids = local.tokenizer.encode_prompt(context + continuation)
    supervised = np.arange(len(ids)) >= len(local.tokenizer.encode_prompt(context))
    [score] = local.score([EncodedRow(np.array(ids), supervised)])
    return float(score.logprobs.sum()), bool(score.best.all())
