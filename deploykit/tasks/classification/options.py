"""Define the options of a fine-tuning run for classification."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from deploykit.data.noise import BACK_TRANSLATION, MASK, SYNONYMS, parse_noise
from deploykit.data.reading import flag
from deploykit.errors import UsageError
from deploykit.tasks.classification.facts import LABEL_SEPARATOR, Classification
from deploykit.text import normalize
from deploykit.training.options import FinetuneOptions, described

if TYPE_CHECKING:
    from deploykit.quantization.calibration import Method


@dataclass(frozen=True)
class ClassificationOptions(FinetuneOptions):
    """Options of a run for classification."""

    task: str = Classification.name
    text_column: tuple[str, ...] = described(
        (),
        "Text column (default: detected). Given twice, it names a pair of texts; the tokenizer puts its separator between them.",
    )
    label_column: tuple[str, ...] = described(
        (),
        "Label column (default: detected); with --multi-label repeat it for columns of 0 and 1 that are named after their "
        "labels.",
    )
    text_separator: str | None = described(None, "Join the text columns into one text, with this separator.")
    multi_label: bool = described(False, "Allow any number of labels per row: a list, or names separated by |.")
    regression: bool = described(False, "The label is a number: train on the squared error.")
    labels: str | None = described(
        None, "All labels, separated by commas, in the order of the model's outputs (default: those in the rows)."
    )
    label_separator: str | None = described(None, "Separator of a row's labels with --multi-label (default: |).")
    max_length: int = 0
    num_train_epochs: float = 0.0
    learning_rate: float = 0.0
    per_device_train_batch_size: int = described(0, "Rows of a batch; 0: chosen from the rows (classification).")
    class_weights: str = described(
        "none", "Weight classes by their inverse frequency (balanced), or not.", choices=("none", "balanced")
    )
    classifier_dropout: float | None = described(
        None, "Dropout before the head (default: --dropout, or the checkpoint's)."
    )
    focal_gamma: float = described(
        0.0, "Focal loss: weight a row by (1 - the probability of its label) to this power; 0: off."
    )
    r_drop: float = described(
        0.0, "R-Drop: weight of the divergence between two passes of a batch with different dropout; 0: off."
    )
    teacher: str | None = described(
        None,
        "Distillation: also learn from this model, a checkpoint, an export or a served model's name: its probabilities "
        "(classification; question-answering, not of a served model; text-generation, of a checkpoint), or the translations of "
        "its beam search (translation).",
    )
    distill_alpha: float = described(0.5, "Share of the teacher in the loss; the labels have the other share.")
    distill_temperature: float = described(2.0, "Temperature of teacher and student in the loss.")
    distill_hidden: float = described(
        0.0,
        "Also learn the hidden states of a teacher that is a checkpoint with the student's tokenizer, layer by layer, with "
        "this weight; 0: off.",
    )
    student_layers: int = described(0, hidden=True)
    augment: tuple[str, ...] = described(
        (),
        "Also train on a copy of each training row with noise, as typos=0.1: a rate of the words. Noises: typos, case, "
        "punctuation, swap, delete (translation: of the source; question-answering: of the question; text-generation: of "
        "what the user writes), and of classification synonyms, mask (other words by a masked language model) and "
        "back-translation (a rate of the rows). Repeat for several.",
    )
    synonyms: str | None = described(
        None,
        "Words for --augment synonyms: a file with lines of interchangeable words, separated by commas, "
        "or a MyThes thesaurus (.dat).",
    )
    mask_model: str | None = described(
        None, "Masked language model for --augment mask, a folder or a hub id (default: TARGET)."
    )
    back_translate: tuple[str, ...] = described(
        (),
        "Translators for --augment back-translation, to another language and back: checkpoints, exports, or names of "
        "served models.",
        values=("FORWARD", "BACKWARD"),
    )
    temperature_scaling: bool = described(
        False, "Divide the logits by the temperature that fits the validation rows, in the checkpoint and its exports."
    )
    qat: bool = described(
        False,
        "Quantization-aware training: continue a fine-tuned checkpoint with its linear layers rounded to INT8, if `export "
        "--int8` loses too much otherwise.",
    )
    qat_method: Method = described(
        "minmax",
        "Calibration method of the ranges that --qat starts with.",
        ("minmax", "entropy", "percentile", "mse"),
    )

    shares_batches: ClassVar[bool] = True

    dropouts: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **FinetuneOptions.dropouts,
        "classifier_dropout": ("classifier_dropout", "classifier_dropout_prob", "seq_classif_dropout", "cls_dropout"),
    }

    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {
        **FinetuneOptions.ranges,
        "per_device_train_batch_size": (0, 100_000),
        "learning_rate": (0, 10),
        "num_train_epochs": (0, 1e6),
        "max_length": (0, 100_000),
        "classifier_dropout": (0, 0.99),
        "focal_gamma": (0, 20),
        "r_drop": (0, 100),
        "distill_alpha": (0, 1),
        "distill_temperature": (0.01, 100),
        "distill_hidden": (0, 1000),
        "student_layers": (0, 1000),
    }

    @property
    def unset(self) -> tuple[str, ...]:
        names = ("learning_rate", "num_train_epochs", "per_device_train_batch_size", "max_length")
        return tuple(name for name in names if not getattr(self, name))

    @property
    def pair(self) -> bool:
        """Whether the two text columns are given to the tokenizer as a pair."""
        return len(self.text_column) == 2 and self.text_separator is None

    @property
    def label_order(self) -> tuple[str, ...]:
        """The labels that ``--labels`` names, in the order of the model's outputs; () where it is not given."""
        return tuple(normalize(label) for label in self.labels.split(",")) if self.labels is not None else ()

    @property
    def named_labels(self) -> tuple[str, ...]:
        """The labels that the options name: by ``--labels``, or by several ``--label-column``; () if they name none."""
        return self.label_order or (tuple(map(normalize, self.label_column)) if len(self.label_column) > 1 else ())

    @classmethod
    def of_run(cls, facts: Classification) -> Mapping[str, Any]:
        return {
            "text_column": ("text", "text_pair") if facts.pair else ("text",),
            "label_column": ("label",),
            "encoding": "utf-8",
            "multi_label": facts.multi_label,
            "regression": facts.regression,
            "label_separator": LABEL_SEPARATOR if facts.multi_label else None,  # as the run's own rows have it
            "max_length": facts.max_length,
            "test_fraction": 0.0,  # none of the rows that the run was trained on
        }

    def dropout_config(self, config: Any) -> dict[str, float]:
        """Return the dropouts that are given. The head's is ``dropout`` if it has one and nothing else is given."""
        found = super().dropout_config(config)
        if self.dropout is None:
            return found
        heads = (name for name in self.dropouts["classifier_dropout"] if hasattr(config, name))
        return {**dict.fromkeys(heads, self.dropout), **found}

    def check(self) -> None:
        super().check()
        if len(self.text_column) > 2 and self.text_separator is None:
            raise UsageError(
                f"{len(self.text_column)} text columns are given, but a model reads one text or a pair",
                "join them into one text: --text-separator ' '",
            )
        if 0 < self.max_length < 3:
            raise UsageError(f"--max-length is {self.max_length}", "give at least 3 tokens, or 0 for the default")
        labels = self.label_order
        if not all(labels) or len(set(labels)) < len(labels) or any(LABEL_SEPARATOR in label for label in labels):
            raise UsageError(f"--labels is {self.labels!r}", "name each label once, with commas between, without '|'")
        if self.regression:
            for name in ("multi_label", "labels", "qat", "label_smoothing_factor", "focal_gamma"):
                if getattr(self, name):
                    raise UsageError(f"{flag(name)} is for labels, but --regression predicts numbers", "leave one out")
            if self.class_weights != "none":
                raise UsageError("--class-weights is for labels, but --regression predicts numbers", "leave one out")
        if len(self.label_column) > 1:
            if not self.multi_label:
                raise UsageError(
                    "several --label-column are for several labels a row", "add --multi-label, or give one"
                )
            if self.label_separator is not None:
                raise UsageError(
                    "--label-separator is for labels in one column", "leave it out, or give one --label-column"
                )
        if self.label_separator is not None and not self.multi_label:
            raise UsageError("--label-separator is for several labels a row", "add --multi-label")
        if self.model is None:
            raise UsageError(
                "there is no checkpoint to fine-tune",
                "name its folder, or a hub id: deploykit finetune TARGET --train FILE",
            )
        if self.multi_label and (self.label_smoothing_factor or self.class_weights != "none"):
            raise UsageError(
                "--label-smoothing-factor and --class-weights are for one label a text",
                "leave them out with --multi-label",
            )
        if self.qat and not self.validates and self.test is None and not self.test_fraction:
            raise UsageError(
                "--qat measures before and after training, but no rows are held out", "give --validation or --test"
            )
        self.refuse_without("teacher", "distill_alpha", "distill_temperature", "distill_hidden")
        self._check_noises()
        if self.qat and (self.teacher or self.student_layers):
            raise UsageError("--qat continues the training of a checkpoint", "leave out --teacher and --student")
        if self.student_layers and self.lora_r:
            raise UsageError("--student changes the layers that an adapter of --lora-r would adapt", "leave one out")
        if self.temperature_scaling and (self.qat or self.regression or not self.validates):
            reason = (
                "--qat keeps it" if self.qat else "numbers have none" if self.regression else "it is fitted on them"
            )
            what = "validation rows" if not (self.qat or self.regression) else "labels without --qat"
            raise UsageError(f"--temperature-scaling needs {what}: {reason}", "leave it out")
        if self.qat and self.lora_r:
            raise UsageError("--qat trains the rounded weights, and --lora-r trains an adapter", "leave one out")
        self.refuse_without("qat", "qat_method")

    def _check_noises(self) -> None:
        names = {parse_noise(noise)[0] for noise in self.augment}
        for noise, name in ((SYNONYMS, "synonyms"), (MASK, "mask_model"), (BACK_TRANSLATION, "back_translate")):
            if getattr(self, name) and noise not in names:
                raise UsageError(
                    f"{flag(name)} is for --augment {noise}", f"add --augment {noise}=RATE, or leave it out"
                )
        if SYNONYMS in names and self.synonyms is None:
            raise UsageError(
                "--augment synonyms needs a list of words",
                "name one: --synonyms FILE; of English: apt install mythes-en-us, --synonyms "
                "/usr/share/mythes/th_en_US_v2.dat",
            )
        if BACK_TRANSLATION in names and len(self.back_translate) != 2:
            raise UsageError(
                "--augment back-translation needs two translators", "name them: --back-translate FORWARD BACKWARD"
            )
