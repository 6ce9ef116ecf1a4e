"""Measure supervised fine-tuning of a language model: deploykit, the plain Trainer of transformers, and trl's SFTTrainer.

All train SmolLM2-135M-Instruct on the same rows of the demo (descriptions and shell commands) for one epoch with the same
learning rate and schedule, and compute the same loss, on the answers' tokens. Each runs in a separate process, and they
take turns. Each round has another seed for the split and the order of the rows, the same for all. Tokens/s count the tokens of the rows, not the padding; the time is that of the training loop alone. Writes
bench/results/<date>-finetuning.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from generation_contenders import ROOT, smollm2
from suite import begin, say, write_record

from deploykit.bench.machine import other_load
from deploykit.bench.run import spread
from deploykit.hardware import available_cpus
from deploykit.tasks.text_generation.cheat_sheets import fetch_command_pairs
from deploykit.tasks.text_generation.options import TextGenerationOptions

DEPLOYKIT, LORA, PLAIN, TRL = "deploykit", "deploykit, LoRA of rank 32", "transformers Trainer", "trl SFTTrainer"
NAMES = (DEPLOYKIT, LORA, PLAIN, TRL)
_RATE, _LORA_RATE = 1e-4, 1e-3
_PLAIN_BATCH = 8
"""Rows a step: the default of both Trainers."""


def main() -> None:
    options = _options()
    if options.worker:
        train(options.worker, options)
        return
    missing = {} if find_spec("trl") else {TRL: "trl is not installed: pip install trl"}
    suite = begin("finetuning.py", options.threads, missing, ["trl", "peft", "datasets"])
    checkpoint = options.checkpoint or smollm2(options.folder)
    pairs = fetch_command_pairs(options.folder / "commands")
    suite["settings"] = {"rounds": options.rounds, "max_rows": options.max_rows, "batch_rows": _PLAIN_BATCH,
                         "batch_tokens": options.batch_tokens}  # fmt: skip
    suite["load_before"] = []
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in options.contenders if name not in missing}
    for number in range(options.rounds):
        suite["load_before"].append(other_load().to_json())
        for name, found in rounds.items():
            found.append(_in_process(name, options, checkpoint, pairs, number))
            one = found[-1]
            say(f"round {number + 1}: {name}: {one['tokens_per_s']:.0f} tokens/s, validation loss {one['loss']:.4f}")
    suite["workloads"].append({"key": "demo", "contenders": summary(rounds)})
    write_record(suite, options.out)


def summary(rounds: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return a record for each contender: spreads of tokens/s and seconds, and the loss of a validation token."""
    return [
        {
            "name": name,
            "tokens_per_s": spread([one["tokens_per_s"] for one in found]),
            "seconds": spread([one["seconds"] for one in found]),
            "loss": spread([one["loss"] for one in found]),
            "losses": [one["loss"] for one in found],
            "loss_before": found[0]["loss_before"],
            "tokens": found[0]["tokens"],
            "steps": found[0]["steps"],
        }
        for name, found in rounds.items()
    ]


def _in_process(name: str, options: argparse.Namespace, checkpoint: Path, pairs: Path, seed: int) -> dict[str, Any]:
    words = ["--worker", name, "--checkpoint", str(checkpoint), "--pairs", str(pairs), "--max-rows", str(options.max_rows),
             "--threads", str(options.threads), "--batch-tokens", str(options.batch_tokens), "--seed", str(seed)]  # fmt: skip
    done = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, check=True)
    record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return record


def train(name: str, options: argparse.Namespace) -> None:
    """Train one contender in this process, and print its record as a line of JSON."""
    import torch
    from transformers import set_seed

    from deploykit.freed_memory import keep_memory
    from deploykit.tasks.text_generation.checkpoint import load_base
    from deploykit.tasks.text_generation.training import TextGenerationStage
    from deploykit.training.checkpoint import quiet
    from deploykit.training.rows import read_rows

    quiet()
    torch.set_num_threads(options.threads)
    chosen = TextGenerationOptions(
        model=str(options.checkpoint), train=str(options.pairs), max_train_samples=options.max_rows,
        validation_fraction=0.05, test_fraction=0.07, learning_rate=_LORA_RATE if name == LORA else _RATE,
        lora_r=32 if name == LORA else 0, eval_steps=100_000, batch_tokens=options.batch_tokens,
        lr_scheduler_type="cosine", warmup_ratio=0, weight_decay=0, seed=options.seed,  # as the others' arguments are
    )  # fmt: skip
    stage = TextGenerationStage(chosen)
    rows = read_rows(stage, chosen, say=lambda line: None)
    train_rows, validation = (stage.encoded(rows.splits[split]) for split in ("train", "validation"))
    set_seed(chosen.seed)
    model = load_base(str(options.checkpoint))
    before = validation_loss(model, validation)
    with tempfile.TemporaryDirectory() as work:
        if name in (DEPLOYKIT, LORA):
            trainer = _ours(model, train_rows, stage, chosen, Path(work))
        elif name == PLAIN:
            trainer = _plain(model, train_rows, chosen, Path(work))
        else:
            trainer = _trl(model, rows.splits["train"], stage, chosen, Path(work))
        if name in (DEPLOYKIT, LORA):
            keep_memory()
        started = time.monotonic()
        trainer.train()
        seconds = time.monotonic() - started
        trained = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        tokens = sum(len(row.ids) for row in train_rows)
        record = {
            "tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / seconds, "steps": trainer.state.global_step,
            "loss_before": before, "loss": validation_loss(trained, validation),
        }  # fmt: skip
    print(json.dumps(record))


def validation_loss(model: Any, rows: Sequence[Any]) -> float:
    """Return the loss of a supervised token in nats, of rows read one by one."""
    import torch

    from deploykit.tasks.text_generation.packing import pack
    from deploykit.tasks.text_generation.sft import supervised_loss

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.eval()
    with torch.inference_mode():
        found = [supervised_loss(base, pack([row])) for row in rows]
    return sum(float(loss) for loss, _ in found) / sum(count for _, count in found)


def _ours(model: Any, rows: Sequence[Any], stage: Any, chosen: TextGenerationOptions, work: Path) -> Any:
    from deploykit.tasks.text_generation.sft import sft_trainer

    trainer = sft_trainer(model, rows, [], stage.facts, chosen, work, say=lambda line: None)
    # The others neither validate nor save.
    trainer.args.eval_strategy = trainer.args.save_strategy = "no"
    trainer.args.load_best_model_at_end = False
    return trainer


def _arguments(chosen: TextGenerationOptions, kind: Any, work: Path, **own: Any) -> Any:
    return kind(
        output_dir=str(work), num_train_epochs=1, learning_rate=chosen.learning_rate, lr_scheduler_type="cosine",
        use_cpu=True, report_to="none", save_strategy="no", logging_steps=1000, seed=chosen.seed, disable_tqdm=True, **own,
    )  # fmt: skip


def _plain(model: Any, rows: Sequence[Any], chosen: TextGenerationOptions, work: Path) -> Any:
    """Return transformers' Trainer in usual code: rows of a batch padded to the longest, the model's own loss."""
    from functools import partial

    from transformers import Trainer, TrainingArguments

    from deploykit.tasks.text_generation.packing import EncodedRows, pad

    return Trainer(
        model=model, args=_arguments(chosen, TrainingArguments, work, remove_unused_columns=False),
        train_dataset=EncodedRows(rows), data_collator=partial(pad, pad_token_id=0),
    )  # fmt: skip


def _trl(model: Any, rows: Sequence[Any], stage: Any, chosen: TextGenerationOptions, work: Path) -> Any:
    """Return trl's SFTTrainer with its defaults, except bf16, which this CPU may lack."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer  # type: ignore[import-not-found]

    from deploykit.training.trainer import computes_bf16

    data = Dataset.from_list(
        [{"prompt": list(row.messages[:-1]), "completion": [row.messages[-1]]} for row in rows]
    )  # fmt: skip
    return SFTTrainer(
        model=model, args=_arguments(chosen, SFTConfig, work, bf16=computes_bf16()), train_dataset=data,
        processing_class=stage.hf_tokenizer,
    )  # fmt: skip


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, help="folder of another language model (default: SmolLM2, fetched)")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "demo/generation-bench", help="where model and rows are kept"
    )
    parser.add_argument("--contenders", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--max-rows", type=int, default=0, help="rows to read (default: all)")
    parser.add_argument("--batch-tokens", type=int, default=TextGenerationOptions.batch_tokens,
                        help="deploykit's tokens a step; 448 gives it about as many steps as the others take")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=available_cpus())
    parser.add_argument("--worker", choices=NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--pairs", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    default = ROOT / "bench" / "results" / f"{datetime.date.today()}-finetuning.json"
    parser.add_argument("--out", type=Path, default=default)
    return parser.parse_args()


if __name__ == "__main__":
    main()
