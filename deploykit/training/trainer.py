"""Run Hugging Face's Trainer, with its arguments, so that a killed run can be resumed."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import get_last_checkpoint

from deploykit.freed_memory import keep_memory
from deploykit.tasks.protocol import TaskFacts
from deploykit.training import processes
from deploykit.training.divergence import Divergence
from deploykit.training.interruption import interruption_callbacks
from deploykit.training.options import FinetuneOptions
from deploykit.training.progress import Progress
from deploykit.training.regularization import regularization_callbacks
from deploykit.training.rows import Say

if TYPE_CHECKING:
    from deploykit.training.qat import TrainedScales

Watch = Callable[[float, float], None]
"""Called after each evaluation with the share of the run that is done and the metric "selection"; may raise to end the run."""

# A variable of the context, and not an argument, so that the training of each task need not pass it on.
_watch: ContextVar[Watch | None] = ContextVar("watch", default=None)
_OPTIMIZERS = {"adamw": "adamw_torch_fused", "sgd": "sgd"}
_MOST_STEPS_BETWEEN_CHECKPOINTS = 500
_MOST_EVALUATIONS = 30


@dataclass(frozen=True)
class Trained:
    """The result of training. ``metrics`` has a key for each held-out split, and what else the task measured; ``scales``
    are those of quantization-aware training. ``write_page`` writes the run's page to a folder."""

    task: TaskFacts
    model: Any
    tokenizer: Any
    metrics: dict[str, Any]
    scales: TrainedScales | None = None
    write_page: Callable[[Path], None] | None = None


def arguments(
    options: FinetuneOptions, batches: int, work: Path, kind: type = TrainingArguments, **own: Any
) -> TrainingArguments:
    """Return ``options`` as Trainer's arguments; ``batches`` is the number per epoch over all processes, ``own`` has the task's additions.

    The best evaluation is the one with the highest metric "selection"; without validation rows there is none. Checkpoints
    go to ``work``.
    """
    steps_per_epoch = math.ceil(math.ceil(batches / processes.count()) / options.gradient_accumulation_steps)
    total = options.max_steps or math.ceil(steps_per_epoch * options.num_train_epochs)
    every = options.eval_steps or max(
        math.ceil(total / _MOST_EVALUATIONS),
        min(steps_per_epoch, math.ceil(total / 3), _MOST_STEPS_BETWEEN_CHECKPOINTS),
    )
    return kind(
        output_dir=str(work),
        num_train_epochs=options.num_train_epochs,
        max_steps=options.max_steps or -1,
        per_device_eval_batch_size=64,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        learning_rate=options.learning_rate,
        optim=_OPTIMIZERS[options.optimizer],
        lr_scheduler_type=options.lr_scheduler_type,
        warmup_steps=math.ceil(options.warmup_ratio * total),
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        bf16=options.mixed_precision == "bf16" or (options.mixed_precision == "auto" and computes_bf16()),
        fp16=options.mixed_precision == "fp16",
        use_cpu=not torch.cuda.is_available(),
        seed=options.seed,
        eval_strategy="steps" if options.validates else "no",
        eval_steps=every if options.validates else None,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        logging_steps=max(1, min(50, total // 20)),
        load_best_model_at_end=options.validates,
        metric_for_best_model="selection" if options.validates else None,
        greater_is_better=True,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        **own,
    )


def computes_bf16() -> bool:
    """Return whether this machine has bf16 matrix instructions: then products are 1.8x as fast as in fp32 (measured on AVX512)."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return re.search(r"\b(avx512_bf16|amx_bf16)\b", flags) is not None


@contextmanager
def watched(watch: Watch | None) -> Iterator[None]:
    """Call ``watch`` after each evaluation of the runs in this block."""
    token = _watch.set(watch)
    try:
        yield
    finally:
        _watch.reset(token)


class _Watcher(TrainerCallback):  # type: ignore[misc]
    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Mapping[str, float], **_: Any) -> None:
        self._watch(state.global_step / state.max_steps, metrics["eval_selection"])


def callbacks(options: FinetuneOptions, logs: Path, say: Say) -> list[Any]:
    """Return the callbacks: TensorBoard's logs, progress, and, if requested, early stopping, regularization and ``watched``."""
    found: list[Any] = []
    if processes.is_first():
        found += [TensorBoardCallback(SummaryWriter(log_dir=str(logs))), Progress(say)]
    # Divergence comes first, so that an interrupted run saves no weights that are not finite.
    found += [Divergence(), *regularization_callbacks(options), *interruption_callbacks()]
    if (watch := _watch.get()) is not None:
        found.append(_Watcher(watch))
    if options.early_stopping_patience:
        found.append(EarlyStoppingCallback(options.early_stopping_patience))
    return found


def run(trainer: Any) -> Any:
    """Train, from the last checkpoint where there is one, and return the model as it was at its best evaluation, or at its
    last step if there are no evaluations.

    It comes back in fp32, on the CPU, in eval mode, to the first process. The others end here.
    """
    work = trainer.args.output_dir
    keep_memory()
    trainer.remove_callback(PrinterCallback)  # it prints its dictionaries as they are
    trainer.train(resume_from_checkpoint=get_last_checkpoint(work) if Path(work).exists() else None)
    if not processes.is_first():
        raise SystemExit(0)
    # Mixed precision leaves its casts around the model's forward pass.
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    return model.to("cpu").float().eval()


class GroupedByLength(LengthGroupedSampler):  # type: ignore[misc]
    """Samples rows in a new order for each epoch, with texts of similar length together.

    The order depends only on seed, epoch and the rows of a step, so that several processes train like one process.
    """

    def __init__(self, args: TrainingArguments, lengths: list[int]) -> None:
        rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        super().__init__(rows, lengths=lengths, generator=torch.Generator())
        self._seed, self._epoch = args.seed, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self._seed + self._epoch)
        found: Iterator[int] = super().__iter__()
        return found


def own_batches(trainer: Any, batches: Iterable[list[int]]) -> Any:
    """Return a loader of ``batches`` of the training rows, which are those of this process already."""
    loader = DataLoader(trainer.train_dataset, batch_sampler=batches, collate_fn=trainer.data_collator)
    device = trainer.accelerator.device
    return prepare_data_loader(loader, device, num_processes=1, process_index=0, put_on_device=True)


def with_adapter(model: Any, options: FinetuneOptions, task_type: str, new: Collection[str] = (), **own: Any) -> Any:
    """Return ``model`` with a LoRA adapter, the only part that is trained (Hu et al., ICLR 2022).

    Modules that have keys in ``new`` are trained whole and saved with the adapter: their random weights are nowhere else.
    ``own`` are settings of peft's ``LoraConfig`` that a task has, in place of these.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    # Heads are trained whole. Of "all-linear" peft leaves out a classifier's by itself, but no others.
    heads = [name for name in ("classifier", "score", "qa_outputs") if hasattr(model, name)]
    # A head of several layers is saved as one: peft does so itself, and does not find what is saved within it.
    modules = {key.rpartition(".")[0] for key in new}
    whole = sorted({head if (head := name.split(".")[0]) in heads else name for name in modules})
    adapter = LoraConfig(
        task_type=TaskType[task_type],
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        modules_to_save=whole or None,
        exclude_modules=[*whole, *heads] or None,
        **{"lora_dropout": 0.05, "target_modules": "all-linear", **own},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft and transformers about each other's next release
        return get_peft_model(model, adapter)
