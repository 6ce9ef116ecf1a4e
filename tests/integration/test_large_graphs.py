"""Models over protobuf's 2 GB keep their weights beside the graph: here the limit is lowered to 10 KB."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from deploykit.cli import main
from deploykit.quantization import onnx_files
from deploykit.runtime.engines import ENGINES
from deploykit.tasks.opening import open_classifier

TEXTS = ["w1 w2", "w150 " * 20, ""]


@pytest.mark.parametrize("smooth", [(), ("--smooth-quant",)])
@pytest.mark.filterwarnings("ignore")
def test_a_large_classifier_is_exported_quantized_packaged_and_answers(
    make_tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smooth: tuple[str, ...]
) -> None:
    make_tiny_checkpoint(tmp_path / "c")
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "".join(f"w{i} w{i + 1},{'good' if i % 2 else 'bad'}\n" for i in range(40)))

    def export(name: str, *more: str) -> Path:
        words = ["export", tmp_path / "c", "--data", rows, "--output-dir", tmp_path / name, *more]
        result = CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return tmp_path / name

    int8 = ("--int8", "--calibration-data", str(rows), "--max-drop", "100", *smooth)
    small = export("small", *int8)
    monkeypatch.setattr(onnx_files, "LARGEST", 10_000)
    large = export("large", *int8)
    assert (large / "model.onnx").stat().st_size < (large / "model.onnx_data").stat().st_size
    assert not list(large.glob("activations*")) + list(large.glob("smoothed*")) + list(small.glob("*_data"))
    words = ["package", large, "--name", "m", "--engine", "onnxruntime", "--precision", "fp32", "--model-repository"]
    result = CliRunner().invoke(main, [*map(str, words), str(tmp_path / "repository")], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    for engine, precision in [
        ("onnxruntime", "fp32"),
        ("openvino", "fp32"),
        ("onnxruntime", "int8"),
        ("openvino", "int8"),
    ]:
        if ENGINES[engine].installed:
            ours, theirs = (
                open_classifier(str(e), url="", engine=engine, precision=precision).scores(TEXTS)
                for e in (large, small)
            )
            np.testing.assert_array_equal(ours, theirs)
    served = open_classifier(str(tmp_path / "repository" / "m" / "1"), url="")
    np.testing.assert_array_equal(
        served.scores(TEXTS), open_classifier(str(small), url="", engine="onnxruntime", precision="fp32").scores(TEXTS)
    )
