"""Show explanations: as a page, and in a terminal's colours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from deploykit.attribution.explain import Deletion, Explanation, Word, mean_deletion, words_of_answers
from deploykit.report.html import figure, page, section, table, write_page
from deploykit.report.svg import add_legend, colour_of, to_svg

_FOR, _AGAINST = (18, 161, 80), (217, 48, 37)
_SHOWN = 100
"""Texts on a page."""


def write_explanations(target: str, explanations: Sequence[Explanation], out: Path, *, by_answer: bool) -> None:
    """Write the HTML file ``out``; ``by_answer`` adds the words that push towards each answer in all texts.

    Raises MissingDependencyError without matplotlib.
    """
    methods = " and ".join(dict.fromkeys(explanation.method for explanation in explanations))
    note = f"By {methods}. Green words raise the answer's log-odds (or the number), red ones lower it."
    deletion = mean_deletion(explanations)
    shown = explanations[:_SHOWN]
    parts = [
        f"<header><h1>{escape(f'Why {target} answers so')}</h1><p>{escape(note)}</p></header>",
        *([_overall(explanations)] if by_answer else []),
        figure(
            "Check by deletion",
            "The explanation is right as far as removing its top words moves the answer more than removing random ones.",
            deletion_curve(deletion) if deletion is not None else None,
        ),
        *(
            section(f"{e.answer}, {e.score:.4g}", "", f'<div style="max-width: 75ch">{_coloured(e)}</div>')
            for e in shown
        ),
    ]
    if len(explanations) > len(shown):
        parts.append(f"<p>The first {len(shown)} of {len(explanations):,} texts.</p>")
    write_page(out, page(f"Why {target} answers so", parts))


def deletion_curve(deletion: Deletion) -> str:
    """Draw the answer's score against the share of words removed."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        share = [100 * value for value in deletion.shares]
        axes.plot(share, deletion.top, "-o", color=colour_of(0), label="without the top words")
        axes.plot(share, deletion.random, "--s", color=colour_of(8), label="without random words")
        axes.set(xlabel="words removed, %", ylabel="mean probability of the answer, or its number")
        add_legend(figure)

    return to_svg("deletion", draw, (8.0, 3.2))


def explanation_lines(explanation: Explanation, *, most: int = 10) -> Iterator[str]:
    """Yield lines for a terminal: the answer, the text in colours, and the words with the largest weights."""
    yield f"{explanation.answer}  {explanation.score:.4f}  ({explanation.method})"
    highest = _highest(explanation)
    pieces, end = [], 0
    for word in explanation.words:
        pieces.append(explanation.text[end : word.start])
        red, green, blue = _FOR if word.weight > 0 else _AGAINST
        strong = abs(word.weight) > highest / 4
        pieces.append(f"\x1b[38;2;{red};{green};{blue}m{word.text}\x1b[0m" if strong else word.text)
        end = word.end
    yield "  " + " ".join("".join([*pieces, explanation.text[end:]]).split())
    top = sorted(explanation.words, key=lambda word: -abs(word.weight))[:most]
    yield "  " + "  ".join(f"{word.text} {word.weight:+.2f}" for word in top)


def answer_lines(explanations: Sequence[Explanation]) -> Iterator[str]:
    """Yield a line for each answer, with the words that push towards it in all texts."""
    for answer, words in words_of_answers(explanations, 12).items():
        yield f"{answer}: " + ", ".join(f"{word} {weight:+.2f} (×{count})" for word, weight, count in words)


def _overall(explanations: Sequence[Explanation]) -> str:
    found: Mapping[str, Sequence[tuple[str, float, int]]] = words_of_answers(explanations)
    rows = [
        [escape(answer) if i == 0 else "", escape(word), f"{weight:+.2f}", str(count)]
        for answer, words in found.items()
        for i, (word, weight, count) in enumerate(words)
    ]
    note = f"Of {len(explanations):,} texts: mean weight in the texts with this answer, and number of occurrences."
    return section(
        "Words that push towards each answer", note, table(("answer", "word", "weight", "occurrences"), rows)
    )


def _coloured(explanation: Explanation) -> str:
    highest = _highest(explanation)
    pieces, end = [], 0
    for word in explanation.words:
        pieces += [escape(explanation.text[end : word.start]), _mark(word, highest)]
        end = word.end
    return "".join([*pieces, escape(explanation.text[end:])])


def _mark(word: Word, highest: float) -> str:
    red, green, blue = _FOR if word.weight > 0 else _AGAINST
    strength = 0.6 * abs(word.weight) / highest
    style = f"background: rgba({red}, {green}, {blue}, {strength:.2f}); border-radius: 3px"
    return f'<span style="{style}" title="{word.weight:+.3f}">{escape(word.text)}</span>'


def _highest(explanation: Explanation) -> float:
    return max((abs(word.weight) for word in explanation.words), default=1.0) or 1.0
