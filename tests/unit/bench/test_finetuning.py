"""The record and the table of bench/finetuning.py."""

from __future__ import annotations

from typing import Any


def test_the_table_has_ratios_to_the_plain_trainer(bench: Any) -> None:
    finetuning, table = bench("finetuning"), bench("table")
    one = {"seconds": 10.0, "loss": 2.0, "loss_before": 5.0, "tokens": 1200, "steps": 3}
    rounds = {
        finetuning.DEPLOYKIT: [{**one, "tokens_per_s": speed} for speed in (90.0, 120.0, 110.0)],
        finetuning.PLAIN: [{**one, "tokens_per_s": 55.0, "loss": 2.25}],
    }
    suite = {
        "started": "2026-01-02T00:00:00", "machine": {"cpu": "CPU", "cpus_usable": 2}, "threads": 2, "settings": {"rounds": 3},
        "load_before": [{"cpu_percent": 99.0}], "workloads": [{"key": "demo", "contenders": finetuning.summary(rounds)}],
    }  # fmt: skip
    text = table.render_finetuning(suite)
    assert "| deploykit | 110 (90 to 120) | 2.00 | 2.00 |" in text
    assert "| transformers Trainer | 55 | 1.00 | 2.25 |" in text
    assert "1,200 tokens" in text
    assert "before training it was 5.00" in text
    assert "not final" in text
