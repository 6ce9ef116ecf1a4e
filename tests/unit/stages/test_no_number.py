"""A checkpoint that computes NaN or infinity for a row is not exported: its INT8 form would hide it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from overflowing import EMBEDDINGS, ROWS, write_overflowing

from deploykit.errors import DataError
from deploykit.graphs.export_options import CalibrationOptions, ExportOptions
from deploykit.quantization.calibration import Calibration, NotFiniteError, Observe, calibrate_named, collect
from deploykit.stages.calibrate import calibrate
from deploykit.stages.export import export
from deploykit.tasks.text_generation.rows import Row


@pytest.mark.parametrize("task", EMBEDDINGS)
def test_an_export_names_the_row_without_numbers(
    task: str, tmp_path: Path, make_tiny_checkpoint: Callable[..., Path], make_tiny_translation: Callable[..., Path]
) -> None:
    checkpoint = write_overflowing(tmp_path / "checkpoint", task, make_tiny_checkpoint, make_tiny_translation)
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, ROWS[task])))
    languages = {"source_lang": "en", "target_lang": "fr"} if task == "translation" else {}
    options = ExportOptions(data=str(data), **languages)
    with pytest.raises(DataError, match=r"^rows\.jsonl:2: the model computed no number for this text"):
        export(checkpoint, tmp_path / "out", options, say=lambda line: None)
    assert not (tmp_path / "out").exists()


def test_a_calibration_names_the_row_without_numbers(
    tmp_path: Path, make_tiny_checkpoint: Callable[..., Path], make_tiny_translation: Callable[..., Path]
) -> None:
    checkpoint = write_overflowing(tmp_path / "checkpoint", "translation", make_tiny_checkpoint, make_tiny_translation)
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, ROWS["translation"])))
    options = CalibrationOptions(calibration_data=str(data), source_lang="en", target_lang="fr")
    with pytest.raises(DataError, match=r"computes NaN or infinity for the calibration row 'fox %' \(encoder"):
        calibrate(checkpoint, tmp_path / "out", options, say=lambda line: None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bad", range(5))
def test_a_row_is_named_by_its_origin(bad: int) -> None:
    def run(rows: Sequence[Row]) -> Calibration:
        if len(rows) < 2 and rows[0] is not given[bad]:
            raise DataError("too few rows", "give more")
        if given[bad] in rows:
            raise NotFiniteError("a calibration row", "layer")
        return Calibration({}, len(rows), "digest", 0.0, 0.0)

    given = [Row(origin=f"rows.csv:{number}") for number in range(5)]
    with pytest.raises(DataError, match=rf"for the calibration row rows\.csv:{bad} \(layer\)"):
        calibrate_named(run, given)
    assert calibrate_named(run, [row for row in given if row is not given[bad]]).rows == 4


def test_no_row_is_named_if_only_several_together_have_no_numbers() -> None:
    def run(rows: Sequence[Row]) -> Calibration:
        if len(rows) == 4:
            raise NotFiniteError("a calibration row", "layer")
        return Calibration({}, len(rows), "digest", 0.0, 0.0)

    with pytest.raises(DataError, match=r"for a calibration row \(layer\)"):
        calibrate_named(run, [Row(origin=f"rows.csv:{number}") for number in range(4)])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_calibration_refuses_activations_that_are_no_numbers(value: float) -> None:
    def run(observe: Observe) -> None:
        observe("layer", np.float32([[0.0, 1.0]]))
        observe("layer", np.float32([[value, 1.0]]))

    with pytest.raises(DataError, match=r"computes NaN or infinity for a calibration row \(layer\)"):
        collect(run, 2, "digest")
