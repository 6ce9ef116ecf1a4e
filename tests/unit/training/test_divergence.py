"""A run whose weights are no longer numbers ends with an error, and writes no checkpoint of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file

from deploykit.cli import main
from deploykit.training.divergence import Divergence


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_diverges_is_an_error_and_keeps_good_checkpoints(
    make_tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "".join(f"word{i % 7} text {i},{'ab'[i % 2]}\n" for i in range(60)))
    model, out = make_tiny_checkpoint(tmp_path / "model"), tmp_path / "run"
    step = Divergence.on_step_end

    def diverging(self: Any, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
        if state.global_step == 3:
            for weights in model.parameters():
                weights.data.fill_(float("nan"))
        step(self, args, state, control, model=model, **rest)

    monkeypatch.setattr(Divergence, "on_step_end", diverging)
    words = ["finetune", str(model), "--train", str(rows), "--max-steps", "6", "--eval-steps", "2", "--output-dir", str(out),
             "--per-device-train-batch-size", "4"]  # fmt: skip
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 1, result.output
    assert "the training diverged: weights are NaN or infinite after step" in result.stderr
    assert "lower --learning-rate" in result.stderr
    assert not out.exists()
    (saved,) = tmp_path.rglob("checkpoint-*/model.safetensors")
    assert saved.parent.name == "checkpoint-2"
    assert all(value.isfinite().all() for value in load_file(saved).values())
