from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from deploykit.cli.common import (
    FORCE,
    PRECISION,
    SERVER_URL,
    THREADS,
    Result,
    answered_record,
    answered_text,
    check_asked,
    deploykit_command,
    failed_rows,
    failed_texts,
    progress_bar,
    reading_options,
)
from deploykit.data.reading import Reading
from deploykit.errors import UsageError


@deploykit_command(
    help="Answer TEXTS, or the rows of a file, with TARGET, a language model: a checkpoint, an export, or a served model."
)
@click.argument("model", metavar="TARGET")
@click.argument("texts", nargs=-1)
@SERVER_URL
@click.option(
    "--input", "source", help="Prompts: .txt (a prompt a line), csv, tsv, jsonl, parquet; also dialogs in 'messages'."
)
@click.option("--output", type=click.Path(path_type=Path), help="JSON lines, one for each row of --input, in order.")
@click.option("--prompt-column", help="Prompt column (default: the training column, or detected).")
@click.option("--system", help="Text of the system message.")
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without the chat template.")
@click.option("--max-new-tokens", type=int, help="Maximum number of tokens to generate. [default: 256]")
@click.option("--temperature", type=float, help="Temperature of sampling; 0 is greedy search. [default: 0]")
@click.option("--top-k", type=int, help="Sample from this many of the likeliest tokens; 0: off.")
@click.option("--top-p", type=float, help="Sample from the likeliest tokens with this total probability; 1: off.")
@click.option("--min-p", type=float, help="Leave out tokens less likely than this share of the likeliest; 0: off.")
@click.option(
    "--typical-p", type=float, help="Sample from the most typical tokens with this total probability; 1: off."
)
@click.option("--repetition-penalty", type=float, help="Divide the scores of tokens that already occurred; 1: off.")
@click.option("--presence-penalty", type=float, help="Subtract this from the scores of tokens in the answer; 0: off.")
@click.option("--frequency-penalty", type=float, help="Subtract this for each time a token is in the answer; 0: off.")
@click.option("--seed", type=int, help="Seed of sampling: the same seed gives the same answer. [default: 0]")
@click.option("--logit-bias", multiple=True, metavar="ID=NUMBER", help="Add to the score of a token; may be repeated.")
@click.option("--stop", multiple=True, help="Text that ends an answer; may be repeated.")
@click.option("--stop-token-ids", multiple=True, type=int, help="Token id that ends an answer; may be repeated.")
@click.option("--min-new-tokens", type=int, help="Number of tokens before which nothing ends an answer. [default: 0]")
@click.option("--ignore-eos", is_flag=True, help="Go on after the model's end tokens.")
@click.option("--n", type=int, help="Number of answers to each prompt. [default: 1]")
@click.option("--best-of", type=int, help="Generate this many answers and keep the --n likeliest per token.")
@click.option(
    "--logprobs", type=int, help="Also give each token's log-probability, and those of this many likeliest tokens."
)
@click.option("--json-schema", metavar="FILE|JSON", help="JSON Schema that answers fit; true: any JSON object.")
@click.option("--regex", help="Regular expression that answers match.")
@click.option("--choice", multiple=True, help="A text that an answer may be; may be repeated.")
@click.option("--grammar", type=click.Path(path_type=Path), help="File of a Lark grammar that answers match.")
@reading_options(on_error="skip")
@FORCE
@PRECISION
@THREADS
def command(
    *, model: str, texts: tuple[str, ...], url: str, source: str | None, output: Path | None, prompt_column: str | None,
    system: str | None, raw: bool, reading: Reading, force: bool, precision: str, threads: int | None, **sampling: Any,
) -> Result:  # fmt: skip
    check_asked("generate", "some prompt", texts, source, output, reading)
    if raw and system is not None:
        raise UsageError("--raw and --system exclude each other", "leave one out")

    from deploykit.runtime.sampling import override
    from deploykit.tasks.opening import identity_of, open_generator
    from deploykit.tasks.text_generation.generate import How, Question, answers, generate_file

    given = _given(sampling)
    where = {"precision": precision, "threads": threads}
    generator = open_generator(model, url=url, **where)
    try:
        how = How(override(generator.task.sampling, given), raw, system)
        if source is None or output is None:
            records = answers(generator, [Question(f"text {i}", p) for i, p in enumerate(texts, start=1)], how)
            code = failed_texts(records, stop=reading.on_error == "stop", remedy="give another prompt")
            return {"results": records}, "\n".join(map(_told, records)), code
        with progress_bar("rows") as progress:
            done = generate_file(
                generator, source, output, how, identity=f"{identity_of(model, generator)} {where}", column=prompt_column,
                reading=reading, force=force, progress=progress,
            )  # fmt: skip
    finally:
        generator.close()
    text = answered_text(output, done, "could not be answered")
    return answered_record(output, done), text, failed_rows(done.problems)


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling parameters that the command line names."""
    given = {name: value for name, value in options.items() if value is not None and value != () and value is not False}
    if "logit_bias" in given:
        given["logit_bias"] = dict(map(_bias, given["logit_bias"]))
    if "json_schema" in given:
        given["json_schema"] = _schema(given["json_schema"])
    if "grammar" in given:
        given["grammar"] = _read("--grammar", given["grammar"])
    return given


def _bias(text: str) -> tuple[str, float]:
    token, _, bias = text.partition("=")
    try:
        return token, float(bias)
    except ValueError:
        raise UsageError(f"--logit-bias {text}: is not a token id, = and a number", "write 42=-100") from None


def _schema(given: str) -> Any:
    text = given if given.lstrip().startswith("{") or given == "true" else _read("--json-schema", Path(given))
    try:
        return json.loads(text)
    except ValueError as error:
        raise UsageError(f"--json-schema {given}: is not JSON: {error}", "correct it") from None


def _read(option: str, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"{option} {path}: cannot be read: {error}", "give a file of UTF-8 text") from None


def _told(record: dict[str, Any]) -> str:
    if "error" in record:
        return f"{record['origin']}: {record['error']}"
    return "\n---\n".join(answer["answer"] for answer in record.get("answers", [record]))
