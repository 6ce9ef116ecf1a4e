"""Calibrate an answerer: observe the inputs of its linear layers while the fp32 graph reads real windows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deploykit.artifacts import digest_of
from deploykit.data.sample import evenly
from deploykit.errors import DataError
from deploykit.quantization.calibration import Calibration
from deploykit.quantization.encoder import GRAPH, TokenRows, calibrate_encoder
from deploykit.tasks.question_answering.facts import QuestionAnswering, from_text
from deploykit.tasks.question_answering.windows import PairTokenizer, Window
from deploykit.text import printable


def calibrate(folder: Path, task: QuestionAnswering, texts: Sequence[str]) -> Calibration:
    """Run windows of ``texts`` (``as_text``) through the fp32 graph in ``folder``."""
    return calibrate_encoder(folder / GRAPH, token_rows(folder, task, texts))


def token_rows(folder: Path, task: QuestionAnswering, texts: Sequence[str]) -> TokenRows:
    """Return a window of each text, tokenized as in serving."""
    windows = sample_windows(
        PairTokenizer.load(folder / "tokenizer.json", task), [from_text(text) for text in texts], len(texts)
    )
    types = [w.types for w in windows] if task.token_types else None
    return TokenRows([w.ids for w in windows], digest_of(list(texts)), types)


def sample_windows(tokenizer: PairTokenizer, pairs: Sequence[tuple[str, str]], count: int) -> list[Window]:
    """Return ``count`` windows, evenly spaced over all windows of the answerable pairs."""
    contexts = {context: tokenizer.context(printable(context)) for _, context in pairs}
    windows: list[Window] = []
    for text, of_pair in pairs:
        question, context = tokenizer.question(printable(text)), contexts[of_pair]
        try:
            tokenizer.check(question, context)
        except DataError:
            continue
        windows += tokenizer.windows(question, context)
    if not windows:
        raise DataError("every question is too long to leave room for its context in a window", "give other rows")
    return evenly(windows, count)
