from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from deploykit.cli.common import (
    ENCODING,
    ENGINE,
    FORCE,
    PRECISION,
    SERVER_URL,
    THREADS,
    Result,
    deploykit_command,
    progress_bar,
)
from deploykit.errors import DataError, UsageError


@deploykit_command(help="Classify TEXTS, or the rows of a file, with any model.")
@click.argument("texts", nargs=-1)
@click.option("--model", required=True, help="A served model's name, or the folder of a checkpoint, export or model.")
@click.option("--input", "source", help="Rows to classify: .txt (a text a line), csv, tsv, jsonl, parquet.")
@click.option("--output", type=click.Path(path_type=Path), help="JSON lines, one for each row of --input, in order.")
@click.option("--text-column", multiple=True, help="(default: the training columns, or detected)")
@ENCODING
@FORCE
@SERVER_URL
@ENGINE
@PRECISION
@THREADS
def command(
    *,
    texts: tuple[str, ...],
    model: str,
    source: str | None,
    output: Path | None,
    text_column: tuple[str, ...],
    encoding: str | None,
    force: bool,
    **where: Any,
) -> Result:
    if bool(texts) == bool(source):
        raise UsageError("give texts, or --input with --output", 'deploykit predict --model NAME "some text"')
    if bool(source) != bool(output):
        raise UsageError("--input and --output go together", "name both")

    from deploykit.data.texts import TextRow
    from deploykit.tasks.classification.predict import answers, predict_file
    from deploykit.tasks.opening import identity_of, open_classifier
    from deploykit.text import normalize

    predictor = open_classifier(model, **where)
    try:
        if source is None or output is None:
            rows = [
                TextRow(f"text {i}", text or None, None if text else "the text is empty")
                for i, text in enumerate(map(normalize, texts), start=1)
            ]
            records = answers(predictor, rows)
            lines = [
                f"{r['label'] or '-':<16} {r['score']:.4f}  {r['text']}"
                if "label" in r
                else f"{r['origin']}: {r['error']}"
                for r in records
            ]
            if all("error" in r for r in records):
                raise DataError("\n".join(lines), "give a text")
            return {"results": records}, "\n".join(lines)
        with progress_bar("rows") as progress:
            done = predict_file(
                predictor,
                source,
                output,
                identity=f"{identity_of(model, predictor)} {where}",
                text_columns=text_column,
                encoding=encoding,
                force=force,
                progress=progress,
            )
    finally:
        predictor.close()
    text = f"{output}: {done.rows:,} rows"
    if done.resumed:
        text += f", {done.resumed:,} of them from the run before"
    if done.errors:
        text += f'; {done.errors:,} could not be answered, see their "error"'
    return {"output": str(output), "rows": done.rows, "errors": done.errors, "resumed": done.resumed}, text
