"""Compare an export with the PyTorch model: the graphs on equal tokens, and the answers from text to scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.data.sample import evenly
from deploykit.errors import ExportError
from deploykit.graphs.encoder_export import running
from deploykit.quantization.encoder import GRAPH
from deploykit.runtime.batching import batches
from deploykit.runtime.engines.protocol import Engine
from deploykit.runtime.tokenizer import Encoded
from deploykit.tasks.classification.checkpoint import TorchClassifier
from deploykit.tasks.classification.facts import Classification, as_text
from deploykit.tasks.classification.predictor import TextClassifier, graph_inputs

BATCH_SIZES = (1, 4, 32)
_ROWS = 64
_TOLERANCE = 1e-3
_SHOWN = 80
_WRITING = (
    "",
    "a",
    "UPPER lower 1,234.56 !? #tag @name https://example.org/a?b=c",
    "Grüße aus Łódź, c'est déjà l'été — “quoted”…",
    "今天天气很好。",
    "日本語のテキストです",
    "مرحبا بالعالم",
    "Привет, мир",
    "नमस्ते दुनिया",
    "🎉 👩‍👩‍👧 👍🏽",
    "two  spaces\tand a tab\nand a line",
    "zero\u200bwidth and\u00a0no-break",
)


@dataclass(frozen=True)
class Parity:
    """Differences of logits over ``rows`` texts, each run at every batch size; lengths in tokens."""

    rows: int
    batch_sizes: tuple[int, ...]
    shortest: int
    longest: int
    max_difference: float
    mean_difference: float
    argmax_agreement: float

    def to_json(self) -> dict[str, Any]:
        return {**self.__dict__, "batch_sizes": list(self.batch_sizes)}


def check_parity(reference: TorchClassifier, engine: Engine, texts: Sequence[str]) -> Parity:
    """Compare fp32 logits. Raises ExportError with the measured difference when they are not the same.

    The texts are spread over all lengths, and joined texts reach the model's longest input.
    """
    task = reference.task
    encoded = _spread(reference, texts)
    differences, agreed = [], []
    for size in BATCH_SIZES:
        for batch in batches(
            encoded.ids, task.pad_token_id, max_length=task.max_length, token_budget=1 << 30, pad_left=task.pad_left
        ):
            whole = graph_inputs(task, encoded, batch)
            for start in range(0, len(batch.rows), size):
                inputs = {name: array[start : start + size] for name, array in whole.items()}
                expected = reference.logits(inputs)
                with running(GRAPH, "onnxruntime"):
                    actual = engine.run(inputs)[0]
                difference = np.abs(expected - actual)
                differences.append(difference)
                # Two labels whose logits in PyTorch differ by less than the tolerance are a tie.
                answers, gap = actual.argmax(axis=1), expected.max(axis=1)
                agreed.append(gap - np.take_along_axis(expected, answers[:, None], axis=1)[:, 0] <= _TOLERANCE)
    all_differences = np.concatenate([d.ravel() for d in differences])
    lengths = [len(ids) for ids in encoded.ids]
    parity = Parity(
        rows=len(encoded.ids),
        batch_sizes=BATCH_SIZES,
        shortest=min(lengths),
        longest=max(lengths),
        max_difference=float(all_differences.max()),
        mean_difference=float(all_differences.mean()),
        argmax_agreement=float(np.concatenate(agreed).mean()),
    )
    if not parity.max_difference <= _TOLERANCE or parity.argmax_agreement < 1:  # "not <=" catches NaN too
        raise ExportError(
            f"the ONNX graph differs from the PyTorch model: logits by up to {parity.max_difference:.2g}, "
            f"answers agree on {parity.argmax_agreement:.1%} of {parity.rows} texts",
            "this architecture does not export faithfully; nothing was written",
        )
    return parity


def probes(task: Classification, texts: Sequence[str]) -> list[str]:
    """Return texts that tokenizers may treat differently: empty, long, other scripts; and some real texts.

    Of a model of pairs, they are pairs: each of these texts before and after another one.
    """
    rows, parts = evenly(list(texts), _ROWS), [part for text in texts[:64] for part in task.read(text)]
    numbered = " ".join(f"{part} {i}" for i, part in enumerate([*parts, *_WRITING] * 8))
    odd = [*_WRITING, " ".join(parts), numbered]
    if task.pair:
        odd = [as_text(one, other) for one, other in zip([*odd, *odd], [*odd[1:], odd[0], *odd])]
    return [text for text in (*odd, *rows) if text or not task.pair]


def check_answers(reference: TorchClassifier, exported: TextClassifier, texts: Sequence[str]) -> None:
    """Compare an export with the checkpoint from text to scores; the checkpoint reads each text alone.

    Raises ExportError with both answers to the text whose scores differ most, when they differ by more than 1e-3.
    """
    # A text without a token has no answer in transformers: models without special tokens refuse it.
    asked = [text for text, ids in zip(texts, reference.encode(texts).ids) if ids]
    expected = reference.task.scores(np.concatenate([reference.logits_alone(text) for text in asked]))
    require_equal(reference.task, asked, expected, exported.scores(asked), "the export")


def require_equal(
    task: Classification,
    texts: Sequence[str],
    expected: NDArray[np.float32],
    actual: NDArray[np.float32],
    name: str,
) -> None:
    """Raise ExportError where fp32 scores, float32 [texts, labels], differ from PyTorch's by more than 1e-3."""
    difference = np.abs(expected - actual).max(axis=1)
    worst = int(np.argmax(np.where(np.isnan(difference), np.inf, difference)))
    if difference[worst] <= _TOLERANCE:
        return
    text = texts[worst]
    shown = text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]} … {text[-_SHOWN // 2 :]}"
    theirs, ours = (
        f"{task.decide(scores[worst : worst + 1])[0]!r} ({', '.join(f'{s:.4f}' for s in scores[worst])})"
        for scores in (expected, actual)
    )
    raise ExportError(
        f"{name}'s answers differ from PyTorch's: to {shown!r} ({len(text):,} characters) PyTorch gives {theirs}, "
        f"{name} {ours}; {int((~(difference <= _TOLERANCE)).sum())} of {len(texts)} texts differ",
        "this checkpoint does not export faithfully; nothing was written",
    )


def _spread(reference: TorchClassifier, texts: Sequence[str]) -> Encoded:
    """Return tokens of texts of all lengths: of some of ``texts``, of a short one, and of one as long as the model reads."""
    sample = list(texts[: 8 * _ROWS])
    lengths = [len(ids) for ids in reference.encode(sample).ids]
    sample = evenly([sample[i] for i in np.argsort(lengths, kind="stable")], _ROWS)
    columns = list(zip(*(reference.task.read(text) for text in texts[:64])))
    ends = [("a",) * len(columns), tuple(" ".join(column) for column in columns)]
    return reference.encode([*sample, *(as_text(*end) if reference.task.pair else end[0] for end in ends)])
