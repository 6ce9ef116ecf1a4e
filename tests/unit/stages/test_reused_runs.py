"""A repeated command reuses its run, also one that an earlier version made."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deploykit.artifacts import MANIFEST, digest_of
from deploykit.errors import ArtifactError
from deploykit.stages.finetune import file_digests, finetune
from deploykit.tasks.classification.options import ClassificationOptions


def _of_an_earlier_version(run: Path, options: ClassificationOptions, without: set[str]) -> None:
    """Write the manifest as a version did that did not know some options, and left out options of None."""
    manifest = json.loads((run / MANIFEST).read_text())
    values = {name: value for name, value in dataclasses.asdict(options).items() if name not in without}
    manifest["options"] = {name: value for name, value in values.items() if value is not None}
    manifest["inputs"] = digest_of("finetune", {**values, **file_digests(options)})
    (run / MANIFEST).write_text(json.dumps(manifest))


def test_options_that_were_added_later_do_not_count_at_their_defaults(
    make_tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    rows, out = tmp_path / "rows.csv", tmp_path / "run"
    rows.write_text("text,label\n" + "".join(f"w{i} w{i % 7},{('bad', 'good')[i % 2]}\n" for i in range(60)))
    options = ClassificationOptions(
        model=str(make_tiny_checkpoint(tmp_path / "m")), train=str(rows), max_steps=1, learning_rate=1e-3,
        num_train_epochs=1, per_device_train_batch_size=8, max_length=16,
    )  # fmt: skip

    def again(**changed: Any) -> bool:
        return finetune(dataclasses.replace(options, **changed), out, say=lambda _: None).reused

    assert not again()
    assert again()
    for without in (set(), {"augment", "r_drop", "distill_alpha"}, {"augment", "teacher"}):
        _of_an_earlier_version(out, options, without)
        assert again(), without
        for changed in ({"augment": ("typos=0.1",)}, {"seed": 1}, {"r_drop": 1.0}):
            with pytest.raises(ArtifactError, match="made from other inputs"):
                again(**changed)
    _of_an_earlier_version(out, dataclasses.replace(options, weight_decay=0.1), {"augment"})
    with pytest.raises(ArtifactError, match="made from other inputs"):
        again()


def test_a_run_of_steps_whose_other_values_were_chosen_is_reused(
    make_tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    rows, out = tmp_path / "rows.csv", tmp_path / "run"
    rows.write_text("text,label\n" + "".join(f"w{i} w{i % 7},{('bad', 'good')[i % 2]}\n" for i in range(60)))
    options = ClassificationOptions(model=str(make_tiny_checkpoint(tmp_path / "m")), train=str(rows), max_steps=2)
    assert not finetune(options, out, say=lambda _: None).reused
    assert finetune(options, out, say=lambda _: None).reused
    with pytest.raises(ArtifactError, match="made from other inputs"):
        finetune(dataclasses.replace(options, max_steps=3), out, say=lambda _: None)


def test_an_unfinished_run_of_other_options_is_named(make_tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    rows, told = tmp_path / "rows.csv", list[str]()
    rows.write_text("text,label\n" + "".join(f"w{i} w{i % 7},{('bad', 'good')[i % 2]}\n" for i in range(60)))
    left, alien, empty = (
        tmp_path / f".{name}.training" for name in ("run.0123456789ab", "other.0123456789ab", "run.ba")
    )
    for folder in (left, alien):
        (folder / "trainer" / "checkpoint-8").mkdir(parents=True)
    empty.mkdir()
    options = ClassificationOptions(
        model=str(make_tiny_checkpoint(tmp_path / "m")), train=str(rows), max_steps=1, learning_rate=1e-3,
        num_train_epochs=1, per_device_train_batch_size=8, max_length=16,
    )  # fmt: skip
    finetune(options, tmp_path / "run", say=told.append)
    assert [line.partition(":")[0] for line in told if "is an unfinished run of other options" in line] == [str(left)]
    assert left.is_dir()
