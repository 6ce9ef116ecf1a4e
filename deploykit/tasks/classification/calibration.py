"""Calibrate a classifier: observe the inputs of its linear layers while the fp32 graph answers real rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deploykit.artifacts import digest_of
from deploykit.quantization.calibration import Calibration
from deploykit.quantization.encoder import GRAPH, TokenRows, calibrate_encoder
from deploykit.runtime.tokenizer import TextTokenizer
from deploykit.tasks.classification.facts import Classification


def calibrate(folder: Path, task: Classification, texts: Sequence[str]) -> Calibration:
    """Run ``texts`` through the fp32 graph in ``folder``."""
    return calibrate_encoder(folder / GRAPH, token_rows(folder, task, texts))


def token_rows(folder: Path, task: Classification, texts: Sequence[str]) -> TokenRows:
    """Return the token ids of ``texts`` as the export in ``folder`` tokenizes them when it is served."""
    tokenizer = TextTokenizer(folder / "tokenizer.json", task.max_length)
    encoded = tokenizer.encode([task.read(text) for text in texts])
    return TokenRows(encoded.ids, digest_of(list(texts)), encoded.types if task.token_types else None)
