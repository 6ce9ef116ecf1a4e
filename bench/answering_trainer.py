"""Fine-tune a checkpoint for question answering with a plain transformers Trainer, as Hugging Face's run_qa.py does.

Reads a job (JSON) from stdin: ``model``, ``train`` (JSON lines in the format of the hub's squad), ``out``, and the
options of the run by their names in deploykit's finetune.toml. An interrupted run continues.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import (
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint


def main() -> None:
    job = json.load(sys.stdin)
    out = Path(job["out"])
    if (out / "config.json").exists():
        return
    work = out.with_name(f".{out.name}")
    set_seed(job["seed"])
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    model = AutoModelForQuestionAnswering.from_pretrained(job["model"], attn_implementation="eager")
    rows = [json.loads(line) for line in Path(job["train"]).read_text(encoding="utf-8").splitlines()]
    windows = list(labelled_windows(rows, tokenizer, job["max_length"], job["doc_stride"]))
    size = job["per_device_train_batch_size"]
    total = math.ceil(math.ceil(len(windows) / size) * job["num_train_epochs"])
    print(f"{len(rows)} questions in {len(windows)} windows, {total} steps", file=sys.stderr)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(work), num_train_epochs=job["num_train_epochs"], per_device_train_batch_size=size,
            learning_rate=job["learning_rate"], warmup_steps=math.ceil(job["warmup_ratio"] * total),
            weight_decay=job["weight_decay"], lr_scheduler_type=job["lr_scheduler_type"], seed=job["seed"],
            train_sampling_strategy="group_by_length", save_steps=job["eval_steps"] or 500, save_total_limit=2,
            report_to="none", use_cpu=True, dataloader_pin_memory=False,
        ),
        train_dataset=windows,
        data_collator=DataCollatorWithPadding(tokenizer),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(work)) if work.exists() else None)
    tokenizer.save_pretrained(out)
    model.save_pretrained(out)


def labelled_windows(
    rows: Sequence[Mapping[str, Any]], tokenizer: Any, max_length: int, doc_stride: int
) -> Iterator[dict[str, Any]]:
    """Yield the windows of each question with the positions of its first answer; the first token where a window lacks it."""
    for row in rows:
        encoded = tokenizer(
            row["question"], row["context"], truncation="only_second", max_length=max_length, stride=doc_stride,
            return_overflowing_tokens=True, return_offsets_mapping=True,
        )  # fmt: skip
        start = row["answers"]["answer_start"][0]
        end = start + len(row["answers"]["text"][0])
        for i, offsets in enumerate(encoded["offset_mapping"]):
            context = [at for at, member in enumerate(encoded.sequence_ids(i)) if member == 1]
            first, last = context[0], context[-1]
            begin = stop = 0
            if offsets[first][0] <= start and offsets[last][1] >= end:
                begin = max(at for at in context if offsets[at][0] <= start)
                stop = min(at for at in context if offsets[at][1] >= end)
            names = ("input_ids", "attention_mask", "token_type_ids")
            inputs = {name: encoded[name][i] for name in names if name in encoded}
            yield {**inputs, "start_positions": begin, "end_positions": stop}


if __name__ == "__main__":
    main()
