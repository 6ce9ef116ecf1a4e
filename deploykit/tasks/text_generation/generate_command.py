from __future__ import annotations

from functools import partial
from typing import Any

import click

from deploykit.cli_parts.asked_texts import answered_record, answered_text, check_asked, failed_rows, failed_texts
from deploykit.cli_parts.command import Result, deploykit_command
from deploykit.cli_parts.many_rows import OUTPUT, RAY, answer_all, refuse_ray
from deploykit.cli_parts.shared_options import DRAFT_MODEL, FORCE, PRECISION, SERVER_URL, THREADS, reading_options
from deploykit.data.reading import Reading
from deploykit.errors import UsageError
from deploykit.tasks.text_generation.sampling_options import given_sampling, sampling_options


@deploykit_command(
    help="Answer TEXTS, or the rows of a file, with TARGET, a language model: a checkpoint (also a .gguf file), an export, or a served model."
)
@click.argument("model", metavar="TARGET")
@click.argument("texts", nargs=-1)
@click.option("--prompt", "prompts", multiple=True, help="A prompt, as one of TEXTS; may be repeated.")
@SERVER_URL
@click.option(
    "--input",
    "source",
    help="Prompts: .txt (a prompt a line), csv, tsv, jsonl, parquet; also dialogs in 'messages', with 'tools'.",
)
@OUTPUT
@RAY
@click.option("--prompt-column", help="Prompt column (default: the training column, or detected).")
@click.option("--system", help="Text of the system message.")
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without the chat template.")
@sampling_options
@reading_options(on_error="skip")
@FORCE
@PRECISION
@DRAFT_MODEL
@THREADS
def command(
    *, model: str, texts: tuple[str, ...], prompts: tuple[str, ...], url: str, source: str | None, output: str | None, ray: str | None,
    prompt_column: str | None,    system: str | None, raw: bool, reading: Reading, force: bool, precision: str, draft_model: str | None, threads: int | None, **sampling: Any,
) -> Result:  # fmt: skip
    texts += prompts
    check_asked("generate", "some prompt", texts, source, output, reading)
    if raw and system is not None:
        raise UsageError("--raw and --system exclude each other", "leave one out")

    from deploykit.runtime.sampling import override
    from deploykit.tasks.opening import open_generator
    from deploykit.tasks.text_generation.generate import PromptOptions, Question, answers, generate_file

    given = given_sampling(sampling)
    where: dict[str, Any] = {"precision": precision, "threads": threads, "url": url}
    if ray is not None and draft_model is not None:
        raise UsageError("--draft-model does not go with --ray", "leave one of them out")
    generator = open_generator(model, draft_model=draft_model, **where)
    try:
        how = PromptOptions(override(generator.task.sampling, given), raw, system)
        if source is None or output is None:
            refuse_ray(ray)
            records = answers(generator, [Question(f"text {i}", p) for i, p in enumerate(texts, start=1)], how)
            code = failed_texts(records, stop=reading.on_error == "stop", remedy="give another prompt")
            return {"results": records}, "\n".join(map(_told, records)), code
        done = answer_all(
            partial(generate_file, how=how, column=prompt_column), generator, model, source, output, where=where, ray=ray,
            reading=reading, force=force, of_answers=(prompt_column, how),
        )  # fmt: skip
    finally:
        generator.close()
    text = answered_text(output, done, "could not be answered")
    return answered_record(output, done), text, failed_rows(done.problems)


def _told(record: dict[str, Any]) -> str:
    if "error" in record:
        return f"{record['origin']}: {record['error']}"
    return "\n---\n".join(answer["answer"] for answer in record.get("answers", [record]))
