from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from deploykit.cli.common import (
    ENCODING,
    FORCE,
    PRECISION,
    THREADS,
    Result,
    deploykit_command,
    progress_bar,
)
from deploykit.errors import DataError, UsageError


@deploykit_command(help="Answer prompts with TARGET, the folder of a language model: a checkpoint or an export.")
@click.argument("target")
@click.option("--prompt", "prompts", multiple=True, help="May be repeated.")
@click.option(
    "--input", "source", help="Prompts: .txt (one a line), csv, tsv, jsonl, parquet; also dialogs in 'messages'."
)
@click.option("--output", type=click.Path(path_type=Path), help=".jsonl, a line for each row of --input, in order.")
@click.option("--prompt-column", help="Of --input (default: detected).")
@click.option("--system", help="What the system message says.")
@click.option("--raw", is_flag=True, help="Continue the prompt as it stands, without the chat template.")
@click.option("--max-new-tokens", type=int, help="Longest answer. [default: 256]")
@click.option("--temperature", type=float, help="0 is greedy search. [default: 0]")
@click.option("--top-k", type=int, help="Sample from so many of the likeliest tokens; 0: off.")
@click.option(
    "--top-p", type=float, help="Sample from the likeliest tokens that have this probability together; 1: off."
)
@click.option("--min-p", type=float, help="Leave out tokens less likely than this share of the likeliest; 0: off.")
@click.option("--repetition-penalty", type=float, help="Divides the scores of tokens that came before; 1: off.")
@click.option("--presence-penalty", type=float, help="Subtracted from the scores of tokens in the answer; 0: off.")
@click.option("--frequency-penalty", type=float, help="Subtracted once for each time they came; 0: off.")
@click.option("--seed", type=int, help="Of sampling: the same seed gives the same answer. [default: 0]")
@click.option("--stop", multiple=True, help="A text that ends an answer; may be repeated.")
@click.option("--n", type=int, help="Answers to each prompt. [default: 1]")
@click.option("--logprobs", is_flag=True, help="Also give each token's log-probability.")
@ENCODING
@FORCE
@PRECISION
@THREADS
def command(
    *, target: str, prompts: tuple[str, ...], source: str | None, output: Path | None, prompt_column: str | None,
    system: str | None, raw: bool, logprobs: bool, encoding: str | None, force: bool, precision: str,
    threads: int | None, stop: tuple[str, ...], **sampling: Any,
) -> Result:  # fmt: skip
    if bool(prompts) == bool(source):
        raise UsageError("give --prompt, or --input with --output", 'deploykit generate TARGET --prompt "..."')
    if bool(source) != bool(output):
        raise UsageError("--input and --output go together", "name both")
    if raw and system is not None:
        raise UsageError("--raw and --system exclude each other", "leave one out")

    from deploykit.runtime.sampling import override
    from deploykit.runtime.served import DEFAULT_URL
    from deploykit.tasks.opening import open_generator
    from deploykit.tasks.text_generation.generate import How, Question, answers, generate_file

    given = {name: value for name, value in {**sampling, "stop": stop}.items() if value not in (None, ())}
    where = {"precision": precision, "threads": threads}
    generator = open_generator(target, url=DEFAULT_URL, **where)
    try:
        how = How(override(generator.task.sampling, given), raw, system, logprobs)
        if source is None or output is None:
            records = answers(generator, [Question(f"prompt {i}", p) for i, p in enumerate(prompts, start=1)], how)
            if all("error" in record for record in records):
                remedy = "give another prompt"
                raise DataError("\n".join(f"{record['origin']}: {record['error']}" for record in records), remedy)
            return {"results": records}, "\n".join(map(_told, records))
        with progress_bar("rows") as progress:
            done = generate_file(
                generator, source, output, how, identity=f"{Path(target).resolve()} {where}", column=prompt_column,
                encoding=encoding, force=force, progress=progress,
            )  # fmt: skip
    finally:
        generator.close()
    text = f"{output}: {done.rows:,} rows"
    if done.resumed:
        text += f", {done.resumed:,} of them from the run before"
    if done.errors:
        text += f"; {done.errors:,} could not be answered"
    return {"output": str(output), "rows": done.rows, "errors": done.errors, "resumed": done.resumed}, text


def _told(record: dict[str, Any]) -> str:
    if "error" in record:
        return f"{record['origin']}: {record['error']}"
    return "\n---\n".join(answer["answer"] for answer in record.get("answers", [record]))
