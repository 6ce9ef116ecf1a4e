"""Find the entities that BIO labels mark, and measure how many are found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from token_classification.facts import OUTSIDE


@dataclass(frozen=True)
class Entity:
    """Words ``start`` to ``end`` (exclusive), of one ``kind``."""

    kind: str
    start: int
    end: int


def entities(labels: Sequence[str]) -> list[Entity]:
    """Parse B-KIND and I-KIND as the CoNLL 2003 scorer does: an I- after another kind, or after none, begins an entity.

    A label without such a prefix is a kind itself; repeated labels are one entity.
    """
    found: list[Entity] = []
    for i, label in enumerate(labels):
        prefix, _, kind = label.partition("-") if label[:2] in ("B-", "I-") else ("I", "", label)
        if label == OUTSIDE:
            continue
        last = found[-1] if found else None
        if prefix == "I" and last is not None and last.end == i and last.kind == kind:
            found[-1] = Entity(kind, last.start, i + 1)
        else:
            found.append(Entity(kind, i, i + 1))
    return found


def entity_metrics(truth: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Compute precision, recall and F1 of entities (correct if kind and words are), and accuracy of words.

    Both arguments have a list of labels for each row, of equal lengths.
    """
    wanted, given, right = Counter[str](), Counter[str](), Counter[str]()
    for expected, answered in zip(truth, predicted):
        ours, theirs = set(entities(expected)), set(entities(answered))
        wanted.update(entity.kind for entity in ours)
        given.update(entity.kind for entity in theirs)
        right.update(entity.kind for entity in ours & theirs)
    words = [(a, b) for expected, answered in zip(truth, predicted) for a, b in zip(expected, answered)]
    precision, recall, f1 = _scores(wanted.total(), given.total(), right.total())
    per_kind = {}
    for kind in sorted(wanted | given):
        p, r, f = _scores(wanted[kind], given[kind], right[kind])
        per_kind[kind] = {"precision": p, "recall": r, "f1": f, "support": wanted[kind]}
    return {
        "entity_precision": precision,
        "entity_recall": recall,
        "entity_f1": f1,
        "accuracy": sum(a == b for a, b in words) / max(len(words), 1),
        "per_kind": per_kind,
    }


def metrics_text(metrics: Mapping[str, Any]) -> str:
    """Return the metrics of each kind as a small table."""
    width = max(9, *map(len, metrics["per_kind"]), 0) + 2
    lines = [f"{'entity':<{width}}{'precision':>10}{'recall':>8}{'F1':>8}{'count':>8}"]
    for kind, m in metrics["per_kind"].items():
        lines.append(f"{kind:<{width}}{m['precision']:>10.4f}{m['recall']:>8.4f}{m['f1']:>8.4f}{m['support']:>8,}")
    of_all = (metrics["entity_precision"], metrics["entity_recall"], metrics["entity_f1"])
    lines.append(f"{'all':<{width}}{of_all[0]:>10.4f}{of_all[1]:>8.4f}{of_all[2]:>8.4f}")
    return "\n".join([*lines, f"accuracy of words {metrics['accuracy']:.4f}"])


def _scores(wanted: int, given: int, right: int) -> tuple[float, float, float]:
    precision, recall = right / given if given else 0.0, right / wanted if wanted else 0.0
    return precision, recall, 2 * right / (wanted + given) if wanted + given else 1.0
