"""Count test sentences whose translation has exactly the tokens of Hugging Face's generate.

Greedy and with 4 beams, in fp32; other translations must be ties. Writes bench/results/<date>-exactness.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path

from deploykit.artifacts import new_file
from deploykit.bench.machine import describe_machine
from deploykit.bench.rows import read_rows
from deploykit.hardware import available_cpus
from deploykit.runtime.engines import TRANSLATION_FILES
from deploykit.runtime.engines.seq2seq import Seq2SeqModel
from deploykit.tasks.translation.checkpoint import TorchTranslator
from deploykit.tasks.translation.parity import check_parity

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "demo/runs/en-fr")
    parser.add_argument("--export", type=Path, default=ROOT / "demo/exports/en-fr")
    parser.add_argument("--max-rows", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results" / f"{datetime.date.today()}-exactness.json")
    options = parser.parse_args()
    reference = TorchTranslator.load(options.checkpoint)
    data = options.checkpoint / "splits" / "test.jsonl"
    texts, _ = read_rows(str(data), reference.task, most=options.max_rows, seed=0)
    model = Seq2SeqModel(options.export, TRANSLATION_FILES["fp32"], available_cpus())
    parity = check_parity(reference, model, reference.encode(texts))
    result = {
        "schema": 1,
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "parity": parity.to_json(),
    }
    with new_file(options.out) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{options.out}: {parity.generations}")


if __name__ == "__main__":
    main()
