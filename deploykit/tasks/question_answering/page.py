"""Write a page that shows answers highlighted in their contexts, wrong ones first."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from html import escape
from pathlib import Path

import numpy as np

from deploykit.artifacts import new_file
from deploykit.data.reading import AS_FOUND, Reading
from deploykit.tasks.question_answering.evaluate import found_for, labelled_questions
from deploykit.tasks.question_answering.metrics import answer_metrics, scores
from deploykit.tasks.question_answering.predictor import TextAnswerer
from deploykit.tasks.question_answering.rows import Example
from deploykit.tasks.question_answering.spans import Span

_AROUND = 400
"""Characters of context shown on both sides of answers."""
_MOST = 500
_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 60rem; padding: 2rem 1rem; }
article { border-top: 1px solid #8888; padding: .75rem 0; }
h2 { font-size: 1.05rem; margin: 0; }
small { opacity: .7; }
p { margin: .25rem 0; overflow-wrap: anywhere; white-space: pre-wrap; }
mark { background: #ffd84d; color: #000; border-radius: 3px; }
u { text-decoration: underline 3px #2a9d5c; text-underline-offset: 3px; }
"""


def write_page(
    predictor: TextAnswerer,
    name: str,
    source: str,
    out: Path,
    *,
    reading: Reading = AS_FOUND,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> int:
    """Answer the labelled questions of ``source`` and write at most 500 of them, lowest F1 first.

    Answers are highlighted, right answers underlined. Returns the number of questions shown.
    """
    examples = labelled_questions(source, reading=reading).examples
    found = found_for(predictor, [(e.question, e.context) for e in examples], progress)
    spans = [each.decide(predictor.task.no_answer_threshold) for each in found]
    _, overlap = scores(predictor.task, [span.text for span in spans], [e.answers.text for e in examples])
    metrics = answer_metrics(predictor.task, found, examples)
    order = np.argsort(overlap, kind="stable")[:_MOST]
    title = f"Answers of {name}"
    parts = [
        f"<h1>{escape(title)}</h1><p>{len(examples):,} questions of {escape(source)}: exact match "
        f"{metrics['exact_match']:.3f}, F1 {metrics['f1']:.3f}. <mark>Answer</mark>, <u>right answer</u>; the lowest F1 "
        f"first{'' if len(order) == len(examples) else f', {len(order)} of them'}.</p>"
    ]
    parts += [_article(examples[i], spans[i], float(overlap[i])) for i in order]
    with new_file(out) as file:
        file.write_text(
            f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
            f"<style>{_STYLE}</style>\n</head>\n<body>\n" + "\n".join(parts) + "\n</body>\n</html>\n",
            encoding="utf-8",
            errors="replace",
        )
    return len(order)


def _article(example: Example, span: Span, overlap: float) -> str:
    right = " · ".join(dict.fromkeys(example.answers.text)) or "(no answer)"
    told = f"F1 {overlap:.2f}, score {span.score:.3f}: {span.text or '(no answer)'}; right: {right}"
    return (
        f"<article><h2>{escape(example.question)}</h2><small>{escape(told)}</small>"
        f"<p>{_highlighted(example, span)}</p></article>"
    )


def _highlighted(example: Example, span: Span) -> str:
    """Return the parts of the context around the answer and the right answers as HTML."""
    context = example.context
    right = [(start, start + len(text)) for text, start in zip(example.answers.text, example.answers.answer_start)]
    ours = [(span.start, span.end)] if span.text else []
    places = sorted({*right, *ours})
    if not places:
        return escape(context[: 2 * _AROUND]) + ("…" if len(context) > 2 * _AROUND else "")
    cuts = sorted({0, len(context), *(edge for place in places for edge in place)}
                  | {max(0, start - _AROUND) for start, _ in places}
                  | {min(len(context), end + _AROUND) for _, end in places})  # fmt: skip
    pieces: list[str] = []
    for begin, end in itertools.pairwise(cuts):
        if not any(start - _AROUND <= begin and end <= stop + _AROUND for start, stop in places):
            pieces.append("…" if not pieces or pieces[-1] != "…" else "")
            continue
        piece = escape(context[begin:end])
        if any(start <= begin and end <= stop for start, stop in right):
            piece = f"<u>{piece}</u>"
        if any(start <= begin and end <= stop for start, stop in ours):
            piece = f"<mark>{piece}</mark>"
        pieces.append(piece)
    return "".join(pieces)
