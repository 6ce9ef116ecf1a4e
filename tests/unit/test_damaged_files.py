"""Readers of damaged files: each is read, or refused by an error of deploykit, and nothing worse.

``HYPOTHESIS_PROFILE=long`` tries 10,000 of each cheap kind, and 300 GGUF files.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from language_models import random_model, tokenizer
from mutated import NAMES, VALUES

from deploykit.artifacts import load_manifest, write_manifest
from deploykit.errors import DeploykitError
from deploykit.graphs.gguf_file import write_gguf
from deploykit.quantization.calibration import Calibration, Histogram, load_calibration
from deploykit.tasks.classification.facts import Classification
from deploykit.tasks.text_generation.checkpoint import load_base, load_base_config, load_base_tokenizer

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
FILES = 10_000 if LONG else 200
GGUF_FILES = 300 if LONG else 12
TASK = Classification(labels=("no", "yes"), max_length=16, pad_token_id=0)


def damaged(content: bytes, chance: random.Random, header: int) -> bytes:
    """Return a file cut short, or with other bits or bytes: every other time within the first ``header`` bytes."""
    if chance.random() < 0.2:
        return content[: chance.randrange(len(content))]
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 8))):
        place = chance.randrange(min(header, len(content)) if chance.random() < 0.5 else len(content))
        changed[place] = chance.choice((changed[place] ^ 1 << chance.randrange(8), 0, 0x7F, 0xFF))
    return bytes(changed)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    (tmp_path / "model.onnx").write_bytes(b"weights")
    write_manifest(tmp_path, "export", TASK, inputs="i", metrics={"rows": 3})
    return tmp_path


def test_damaged_manifests_are_refused(artifact: Path) -> None:
    chance = random.Random(0)
    path = artifact / "manifest.json"
    content = path.read_bytes()
    for _ in range(FILES):
        path.write_bytes(damaged(content, chance, 400))
        with contextlib.suppress(DeploykitError):
            load_manifest(artifact)


def test_manifests_with_other_values_are_refused(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their digest is taken to be right, as a forger would have it."""
    monkeypatch.setattr("deploykit.artifacts.digest_of", lambda *parts: "right")
    chance = random.Random(1)
    path = artifact / "manifest.json"
    content = path.read_text()
    for _ in range(FILES):
        record = json.loads(content) | {"digest": "right"}
        for _ in range(chance.choice((1, 1, 2))):
            holder, key = chance.choice(list(places(record)))
            if chance.random() < 0.8:
                holder[key] = chance.choice([value for value in VALUES if value not in (10**5000,)])
            elif isinstance(holder, dict):
                holder[chance.choice([*NAMES, "../x", "/etc/passwd"])] = holder.pop(key)
        path.write_text(json.dumps(record))
        with contextlib.suppress(DeploykitError):
            load_manifest(artifact)


def test_damaged_calibrations_are_refused(tmp_path: Path) -> None:
    """Their hashes are taken to be right."""
    found = Calibration({f"t{i}": Histogram(-1.0, 1.0, np.arange(8)) for i in range(3)}, 5, "digest", 1.0, 10.0)
    found.save(tmp_path)
    metrics = {"rows": 5, "rows_digest": "digest", "seconds": 1.0, "peak_memory_mb": 10.0}
    write_manifest(tmp_path, "calibration", TASK, inputs="i", parent="p", metrics=metrics)
    [path] = tmp_path.glob("*.npz")
    content, chance, refused = path.read_bytes(), random.Random(2), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deploykit.artifacts.verify_files", lambda path, manifest: None)
        assert load_calibration(tmp_path, "p").histograms.keys() == found.histograms.keys()
        for _ in range(FILES):
            path.write_bytes(damaged(content, chance, 200))
            try:
                load_calibration(tmp_path, "p")
            except DeploykitError:
                refused += 1
    assert refused > FILES / 2


def test_damaged_gguf_files_are_refused(tmp_path: Path) -> None:
    whole = tmp_path / "whole.gguf"
    write_gguf(
        random_model("llama linear", mlp_bias=False, tie_word_embeddings=True), tokenizer(), (2, 4), "q8_0", whole
    )
    content, chance, refused = whole.read_bytes(), random.Random(3), 0
    for number in range(GGUF_FILES):
        path = tmp_path / f"{number}.gguf"  # each is remembered by its name
        path.write_bytes(damaged(content, chance, 2000))
        try:
            load_base_config(str(path))
            load_base_tokenizer(str(path))
            load_base(str(path))
        except DeploykitError:
            refused += 1
        path.unlink()
    assert refused > GGUF_FILES / 8
