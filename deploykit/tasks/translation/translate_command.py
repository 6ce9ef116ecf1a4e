from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import click

from deploykit.cli_parts.asked_texts import answered_record, answered_text, check_asked, failed_rows, failed_texts
from deploykit.cli_parts.command import Result, deploykit_command
from deploykit.cli_parts.many_rows import RAY, answer_all, refuse_ray
from deploykit.cli_parts.shared_options import (
    FORCE,
    LONG_INPUT_HELP,
    SPLIT_HELP,
    generation_options,
    model_options,
    reading_options,
    target_and_texts,
)
from deploykit.data.reading import Reading

if TYPE_CHECKING:
    from pathlib import Path

    from deploykit.data.answer_file import Answered
    from deploykit.runtime.serving_settings import LongInput, Split
    from deploykit.tasks.translation.predictor import TextTranslator


@deploykit_command(
    help="Translate TEXTS, or the lines of a file, with TARGET: a checkpoint, an export, a packaged model, or a served model's name."
)
@target_and_texts
@click.option("--input", "source", help="Texts to translate: .txt (a text a line), csv, tsv, jsonl, parquet, po, tmx.")
@click.option("--output", metavar="FILE|FOLDER", help=".txt (a line for each of --input) or .jsonl; for a folder or bucket of files, a "
              "folder or bucket.")  # fmt: skip
@RAY
@click.option("--source-column", help="Source column of --input (default: the training column, or detected).")
@click.option("--long-input", type=click.Choice(["split", "refuse"]), default="split", show_default=True,
              help=LONG_INPUT_HELP)  # fmt: skip
@click.option("--split", type=click.Choice(["sentence", "paragraph", "none"]), default="sentence", show_default=True,
              help=SPLIT_HELP)  # fmt: skip
@generation_options
@reading_options(on_error="skip")
@FORCE
@model_options
def command(
    *,
    texts: tuple[str, ...],
    model: str,
    source: str | None,
    output: str | None,
    ray: str | None,
    source_column: str | None,
    long_input: LongInput,
    split: Split,
    generation: dict[str, Any],
    reading: Reading,
    force: bool,
    **where: Any,
) -> Result:
    check_asked("translate", "some text", texts, source, output, reading)

    from deploykit.data.texts import TextRow
    from deploykit.runtime.generation import override
    from deploykit.tasks.opening import open_translator
    from deploykit.tasks.translation.translate import TranslateOptions, cut_off, translate_file, translations

    translator = open_translator(model, **where)
    try:
        how = TranslateOptions(override(translator.task, generation), long_input, split)
        if source is None or output is None:
            refuse_ray(ray)
            rows = [TextRow(f"text {i}", text, None) for i, text in enumerate(texts, start=1)]
            records = translations(translator, rows, how)
            lines = [r["translation"] if "translation" in r else f"{r['origin']}: {r['error']}" for r in records]
            remedy = "give another text, or another --long-input"
            code = failed_texts(records, stop=reading.on_error == "stop", remedy=remedy)
            finish = Counter(r["finish"] for r in records if "finish" in r)
            if finish["length"]:
                click.echo(f"{cut_off(finish, how)} (see --max-new-tokens)", err=True)
            return {"results": records, "finish": finish}, "\n".join(lines), code
        finish = Counter()

        def answer(translator: TextTranslator, source: str, out: Path, **settings: Any) -> Answered:
            done, found = translate_file(translator, source, out, how, column=source_column, **settings)
            finish.update(found)
            return done

        done = answer_all(
            answer, translator, model, source, output, where=where, ray=ray, reading=reading, force=force,
            of_answers=(source_column, how), rows="texts",
        )  # fmt: skip
    finally:
        translator.close()
    text = answered_text(output, done, "could not be translated")
    if finish["length"]:
        text += f"; {cut_off(finish, how)}"
    return {**answered_record(output, done), "finish": finish}, text, failed_rows(done.problems)
