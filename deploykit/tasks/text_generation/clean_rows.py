"""Clean and split rows: drop unusable rows, and count them by reason."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields

import numpy as np

from deploykit.data.grouping import duplicate_key, group_key
from deploykit.errors import DataError, UsageError
from deploykit.tasks.text_generation.encode import ChatTokenizer, EncodedRow, LossOn, OnLong, fit
from deploykit.tasks.text_generation.rows import RawRow, Row, content_text, role_problem

_BINS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
_BAR = 40
_MOST_BINS = 40


@dataclass(frozen=True)
class CleaningReport:
    """Numbers of rows that were read, dropped for each reason, and kept; their tokens, total and supervised. ``first``: the
    first row that was dropped for some reasons, and what is wrong with it."""

    read: int
    unreadable: int
    empty: int
    refused_by_template: int
    duplicate: int
    contradictory: int
    too_long: int
    nothing_supervised: int
    kept: int
    tokens: int
    supervised_tokens: int
    lengths: tuple[int, ...] = ()
    first: Mapping[str, str] = field(default_factory=dict)

    def lines(self) -> Iterable[str]:
        yield f"{self.read:,} rows read, {self.kept:,} kept"
        for name, told in (
            ("unreadable", "of a wrong form"),
            ("empty", "without a prompt or an answer"),
            ("refused_by_template", "that the chat template refuses, or would write in part"),
            ("duplicate", "twice the same"),
            ("contradictory", "with the prompt of a row before and another answer"),
            ("too_long", "longer than --max-length"),
            ("nothing_supervised", "without a supervised token"),
        ):
            if count := getattr(self, name):
                first = f" (the first is {self.first[name]})" if name in self.first else ""
                yield f"- {count:,} dropped: {told}{first}"
        yield f"{self.tokens:,} tokens, {self.supervised_tokens:,} of them supervised"
        yield from histogram(self.lengths)

    def to_json(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in _counts()}


def _counts() -> list[str]:
    return [f.name for f in fields(CleaningReport) if f.name not in ("lengths", "first")]


def histogram(lengths: Sequence[int]) -> Iterable[str]:
    """Yield lines of text: how many rows have how many tokens."""
    if not lengths:
        return
    counts = [0] * (len(_BINS) + 1)
    for length in lengths:
        counts[sum(length > limit for limit in _BINS)] += 1
    most = max(counts)
    for i, count in enumerate(counts):
        if count:
            name = f"to {_BINS[i]:,} tokens" if i < len(_BINS) else f"over {_BINS[-1]:,} tokens"
            yield f"{name:>16} {count:>8,} {'█' * math.ceil(_BAR * count / most)}"


def length_bins(lengths: Sequence[int]) -> dict[str, list[float]]:
    """Return a histogram of lengths in tokens: ``counts`` between neighbours of ``edges``."""
    counts, edges = np.histogram(lengths, bins=min(_MOST_BINS, max(1, len(set(lengths)))))
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def clean_rows(
    raw: Sequence[RawRow], tokenizer: ChatTokenizer, *, max_length: int, on_long: OnLong, loss_on: LossOn
) -> tuple[list[Row], CleaningReport]:
    """Return the rows that can be trained on, in their order.

    Of rows with the same text (apart from case and white space) the first is kept, and also of rows that answer the same
    prompt differently. Raises DataError for a long row if ``on_long`` is "error".
    """
    dropped = dict.fromkeys(_counts(), 0)
    first: dict[str, str] = {}
    answers: dict[str, str] = {}
    kept: list[Row] = []
    tokens = supervised = 0
    lengths = []
    for item in raw:
        row = item.row
        reason, problem, encoded = _judge(item, tokenizer, loss_on)
        if reason is not None and problem:
            first.setdefault(reason, f"{row.origin}: {problem}")
        if reason is None:
            key = _prompt_key(row)
            answer = duplicate_key(row.answer)
            if key in answers:
                reason = "duplicate" if answers[key] == answer else "contradictory"
        if reason is None and encoded is not None:
            if len(encoded.ids) > max_length and on_long == "error":
                raise DataError(
                    f"{row.origin}: the row has {len(encoded.ids):,} tokens, more than --max-length {max_length:,}",
                    "raise --max-length, or give --on-long drop, truncate or split",
                )
            parts = fit(encoded, max_length, on_long)
            if not parts:
                cut = len(encoded.ids) > max_length and on_long == "drop"
                reason = "too_long" if cut else "nothing_supervised"
            else:
                answers[key] = answer
                kept.append(row)
                lengths.append(len(encoded.ids))
                tokens += sum(len(part.ids) for part in parts)
                supervised += sum(int(part.supervised.sum()) for part in parts)
        if reason is not None:
            dropped[reason] += 1
    counts = {**dropped, "read": len(raw), "kept": len(kept), "tokens": tokens, "supervised_tokens": supervised}
    return kept, CleaningReport(**counts, lengths=tuple(lengths), first=first)


def _judge(item: RawRow, tokenizer: ChatTokenizer, loss_on: LossOn) -> tuple[str | None, str, EncodedRow | None]:
    """Return the reason why a row is dropped and its details, or the row's ids if it is kept."""
    row = item.row
    if item.problem is not None:
        return "unreadable", item.problem, None
    if row.text is not None:
        return ("empty", "", None) if not row.text.strip() else (None, "", tokenizer.encode_row(row, loss_on))
    last = row.messages[-1] if row.messages else {}
    if not row.prompt.strip() or not (row.answer.strip() or last.get("tool_calls")):
        return "empty", "", None
    if (problem := role_problem(row.messages)) is not None:
        return "refused_by_template", problem, None
    try:
        return None, "", tokenizer.encode_row(row, loss_on)
    except DataError as error:
        return "refused_by_template", error.message, None


def _prompt_key(row: Row) -> str:
    """Return a key that is equal for rows with the same prompt: the row without its last answer."""
    if row.text is not None:
        return duplicate_key(row.text)
    parts = [f"{m['role']}: {duplicate_key(content_text(m))}" for m in row.messages[:-1]]
    return json.dumps([parts, row.tools], ensure_ascii=False, default=str)


def split_rows(
    rows: Sequence[Row], *, validation: float, test: float, seed: int
) -> tuple[list[Row], list[Row], list[Row]]:
    """Return training, validation and test rows. Rows whose prompts are near duplicates are never in two of them.

    The split of a row depends only on its prompt and the seed, so additional rows do not move it.
    """
    if validation + test >= 1:
        raise UsageError(
            f"validation {validation:g} and test {test:g} leave no rows for training",
            "let --validation-fraction and --test-fraction add up to less than 1",
        )
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(group_key(row.prompt), []).append(row)

    def drawn(key: str) -> bytes:
        return hashlib.blake2b(f"{seed}\0{key}".encode("utf-8", "surrogatepass"), digest_size=16).digest()

    parts: dict[str, list[Row]] = {"validation": [], "test": [], "train": []}
    wanted = {"validation": math.ceil(validation * len(rows)), "test": math.ceil(test * len(rows))}
    for key in sorted(groups, key=drawn):
        place = next((name for name, count in wanted.items() if len(parts[name]) < count), "train")
        parts[place] += groups[key]
    if not parts["train"] or any(count and not parts[name] for name, count in wanted.items()):
        raise DataError(
            f"{len(rows)} rows ({len(groups)} without near duplicates) are too few for training, validation and test",
            "give more rows, or files of their own for --validation and --test",
        )
    return parts["train"], parts["validation"], parts["test"]


def drop_leaks(train: Sequence[Row], held_out: Iterable[Row]) -> tuple[list[Row], int]:
    """Return training rows without those whose prompts are near duplicates of held-out ones, and how many those were."""
    held = {group_key(row.prompt) for row in held_out}
    kept = [row for row in train if group_key(row.prompt) not in held] if held else list(train)
    return kept, len(train) - len(kept)


def show_row(tokenizer: ChatTokenizer, row: EncodedRow) -> str:
    """Return a row's text for a terminal, supervised tokens green and in ⟦ ⟧."""
    shown = []
    start = 0
    for end in range(1, len(row.ids) + 1):
        if end == len(row.ids) or row.supervised[end] != row.supervised[start]:
            text = tokenizer.tokenizer.decode(row.ids[start:end].tolist(), skip_special_tokens=False)
            shown.append(f"\033[32m⟦{text}⟧\033[0m" if row.supervised[start] else text)
            start = end
    return "".join(shown)
