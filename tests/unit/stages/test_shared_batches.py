"""Tasks that several processes cannot train."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploykit.errors import UsageError
from deploykit.stages.finetune import finetune
from deploykit.training.options import FinetuneOptions


def test_a_task_that_shares_no_batches_trains_in_one_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    options = FinetuneOptions(task="other", train="rows.csv", model="m")
    with pytest.raises(UsageError, match="--task other trains in one process"):
        finetune(options, tmp_path / "run", say=lambda line: None)
