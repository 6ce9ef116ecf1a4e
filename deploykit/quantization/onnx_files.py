"""Write ONNX graphs of any size: protobuf is limited to 2 GB, so a larger graph stores its weights in a separate file."""

from __future__ import annotations

from pathlib import Path

import onnx

LARGEST = 2**31 - 2**26
"""Bytes of weights that a graph's own file holds at most."""
_EXTERNAL_BYTES = 1024
"""Smaller weights are stored in the graph itself."""


def data_file(graph: Path) -> Path:
    """Return the weights file of a graph."""
    return graph.with_name(f"{graph.name}_data")


def is_large(model: onnx.ModelProto) -> bool:
    """Return whether the weights of a graph, all of which are in memory, need a file of their own."""
    return sum(len(tensor.raw_data) for tensor in model.graph.initializer) > LARGEST


def save_graph(model: onnx.ModelProto, path: Path) -> None:
    """Check and write a graph. The weights of a graph that ``is_large`` move from memory to a separate file.

    Raises onnx.checker.ValidationError.
    """
    if is_large(model):
        save_with_weights(model, path)
    else:
        data_file(path).unlink(missing_ok=True)
        onnx.save(model, path)
    onnx.checker.check_model(str(path))


def save_with_weights(model: onnx.ModelProto, path: Path) -> None:
    """Write a graph, and its weights to a separate file. The weights leave the memory."""
    data_file(path).unlink(missing_ok=True)  # onnx would append to it
    location = data_file(path).name
    onnx.save(model, path, save_as_external_data=True, location=location, size_threshold=_EXTERNAL_BYTES)


def remove_graph(path: Path) -> None:
    """Delete a graph, and its file of weights if there is one."""
    path.unlink()
    data_file(path).unlink(missing_ok=True)
