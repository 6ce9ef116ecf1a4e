"""Show explanations: as a page, and in a terminal's colours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from deploykit.attribution.explain import Deletion, Explanation, Measure, Word, mean_deletion, words_of_answers
from deploykit.report.html import figure, page, section, table, write_page
from deploykit.report.svg import add_legend, colour_of, shown, to_svg

_FOR, _AGAINST = (18, 161, 80), (217, 48, 37)
_SHOWN = 100
"""Texts on a page."""
_TITLE = 80
"""Characters of an answer in a title."""
_RAISED: Mapping[Measure, str] = {
    "log-odds": "the answer's log-odds",
    "number": "the number",
    "log-probability": "the answer's log-probability",
    "similarity": "how much of the answer stays",
}
_SCORES: Mapping[Measure, str] = {
    "log-odds": "probability of the answer",
    "number": "number",
    "log-probability": "probability of a token",
    "similarity": "similarity to the answer",
}


def write_explanations(target: str, explanations: Sequence[Explanation], out: Path, *, by_answer: bool) -> None:
    """Write the HTML file ``out``; ``by_answer`` adds the words that push towards each answer in all texts.

    Raises MissingDependencyError without matplotlib.
    """
    methods = " and ".join(dict.fromkeys(explanation.method for explanation in explanations))
    raised = " or ".join(dict.fromkeys(_RAISED[explanation.measure] for explanation in explanations))
    note = f"By {methods}. Green words raise {raised}, red ones lower it."
    deletion = mean_deletion(explanations)
    first = explanations[:_SHOWN]
    parts = [
        f"<header><h1>{escape(f'Explanations of {target}')}</h1><p>{escape(note)}</p></header>",
        *([_overall(explanations)] if by_answer else []),
        figure(
            "Check by deletion",
            "The more the answer loses without its top words than without random words, the better the explanation.",
            deletion_curve(deletion, explanations[0].measure) if deletion is not None else None,
        ),
        *(
            section(
                f"{shown(e.answer, _TITLE)}, {e.score:.4g}",
                "",
                f'<div style="max-width: 75ch; white-space: pre-wrap">{_coloured(e)}</div>{_whole_answer(e)}',
            )
            for e in first
        ),
    ]
    if len(explanations) > len(first):
        parts.append(f"<p>The first {len(first)} of {len(explanations):,} texts.</p>")
    write_page(out, page(f"Explanations of {target}", parts))


def _whole_answer(explanation: Explanation) -> str:
    """Return the answer, if it is longer than a title."""
    if len(explanation.answer) <= _TITLE and "\n" not in explanation.answer:
        return ""
    return f'<p style="white-space: pre-wrap">{escape(explanation.answer)}</p>'


def deletion_curve(deletion: Deletion, measure: Measure) -> str:
    """Draw the answer's score against the share of words removed."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        share = [100 * value for value in deletion.shares]
        axes.plot(share, deletion.top, "-o", color=colour_of(0), label="without the top words")
        axes.plot(share, deletion.random, "--s", color=colour_of(8), label="without random words")
        axes.set(xlabel="words removed, %", ylabel=_SCORES[measure])
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
    note = f"Of {len(explanations):,} texts: mean weight, and number of occurrences."
    title = "Words that push towards each answer" if explanations[0].is_label else "Words with the largest weights"
    return section(title, note, table(("answer", "word", "weight", "occurrences"), rows))


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
