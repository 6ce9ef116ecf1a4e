"""Write a translator's graphs, config and tokenizer as optimum lays them out, and compare them with PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from deploykit.errors import ExportError
from deploykit.graphs.architecture import Architecture
from deploykit.graphs.export_options import Say
from deploykit.graphs.onnx_export import save_hub_files
from deploykit.graphs.optimum_seq2seq import save_optimum
from deploykit.quantization.qdq import Ranges
from deploykit.tasks.translation.checkpoint import TorchTranslator

FOLDER = "optimum"
"""Folder of an export that ``ORTModelForSeq2SeqLM`` opens."""
_DIFFERENCE = 1e-3
"""Largest difference of logits from PyTorch's, relative to the largest logit."""


def write_optimum(
    directory: Path,
    reference: TorchTranslator,
    architecture: Architecture,
    ranges: Ranges,
    texts: Sequence[str],
    say: Say,
) -> float:
    """Write fp32 graphs, and INT8 ones if there are ``ranges``, to the folder ``FOLDER`` of an export.

    Returns the largest difference of the fp32 graphs' logits from PyTorch's, relative to the largest logit.
    Raises ExportError if it is above 1e-3.
    """
    folder = directory / FOLDER
    folder.mkdir()
    names = save_optimum(folder, architecture)
    if ranges:
        save_optimum(folder, architecture, ranges)
    save_hub_files(reference.model, reference.tokenizer, folder)
    reference.model.generation_config.save_pretrained(folder)
    difference = _difference(folder, names, reference, reference.encode(texts))
    say(f"parity of the graphs for optimum: logits differ by at most {difference:.1e} of the largest")
    if not difference <= _DIFFERENCE:
        raise ExportError(
            f"the graphs for optimum differ from PyTorch: logits by {difference:.1e} of the largest",
            "leave --optimum out, and report the checkpoint",
        )
    return difference


def _difference(folder: Path, names: Sequence[str], reference: TorchTranslator, sources: Sequence[list[int]]) -> float:
    """Compare the logits of the first two target tokens of each source, the second with a past."""
    encoder, decoder, with_past = (onnxruntime.InferenceSession(folder / name) for name in names)
    start = reference.task.decoder_start_token_id
    largest = 0.0
    for source in sources:
        ids = np.array([source], np.int64)
        mask = np.ones_like(ids)
        [hidden] = encoder.run(None, {"input_ids": ids, "attention_mask": mask})
        first = {"encoder_hidden_states": hidden, "encoder_attention_mask": mask, "input_ids": np.array([[start]])}
        found = dict(zip((o.name for o in decoder.get_outputs()), decoder.run(None, first)))
        token = found["logits"][0, -1].argmax()
        past = {name.replace("present", "past_key_values"): array for name, array in found.items() if name != "logits"}
        second = {**past, "encoder_attention_mask": mask, "input_ids": np.array([[token]])}
        ours = np.concatenate([found["logits"], with_past.run(["logits"], second)[0]], axis=1)
        with torch.no_grad():
            theirs = reference.model(
                input_ids=torch.tensor(ids), decoder_input_ids=torch.tensor([[start, int(token)]])
            ).logits.numpy()
        finite = np.isfinite(theirs)  # Marian gives its padding token a logit of minus infinity
        scale = np.abs(theirs[finite]).max()
        largest = max(largest, float(np.abs(ours[finite] - theirs[finite]).max() / scale))
    return largest
