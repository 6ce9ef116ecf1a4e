from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING, Any, TextIO

import click

from deploykit.cli_parts.command import Result, deploykit_command, say
from deploykit.cli_parts.shared_options import DRAFT_MODEL, PRECISION, SERVER_URL, THREADS
from deploykit.errors import DataError, ServerError, UsageError
from deploykit.signals import handled
from deploykit.tasks.text_generation.sampling_options import given_sampling, sampling_options

if TYPE_CHECKING:
    from deploykit.tasks.text_generation.generator import TextGenerator

_HELP = "Ctrl-C stops an answer; /reset begins a new dialog; /exit or Ctrl-D ends"


@deploykit_command(help="Chat with TARGET, a language model: a checkpoint, an export, or a served model.")
@click.argument("model", metavar="TARGET")
@SERVER_URL
@click.option("--system", help="Text of the system message.")
@sampling_options
@PRECISION
@DRAFT_MODEL
@THREADS
def command(
    *,
    model: str,
    url: str,
    system: str | None,
    precision: str,
    draft_model: str | None,
    threads: int | None,
    **sampling: Any,
) -> Result:
    from deploykit.runtime.sampling import override
    from deploykit.tasks.opening import open_generator

    generator = open_generator(model, url=url, precision=precision, threads=threads, draft_model=draft_model)
    try:
        if not generator.has_template:
            raise UsageError(f"{model} has no chat template", "continue texts with deploykit generate --raw")
        chosen = override(generator.task.sampling, given_sampling(sampling))
        say(_HELP)
        turns = _talk(generator, chosen, [] if system is None else [{"role": "system", "content": system}])
    finally:
        generator.close()
    return {"turns": turns}, ""


def _talk(generator: TextGenerator, sampling: Any, opening: list[dict[str, str]]) -> int:
    """Read and answer lines until the input ends. Returns the number of answers."""
    out = sys.__stdout__
    assert out is not None
    messages, turns = [*opening], 0
    while True:
        try:
            text = click.prompt("", prompt_suffix="> ", err=True, default="", show_default=False).strip()
        except click.Abort as aborted:
            if isinstance(aborted.__context__, EOFError) or not sys.stdin.isatty():
                return turns
            say(_HELP)  # Ctrl-C that came too late for the answer
            continue
        if text in ("/exit", "/quit"):
            return turns
        if text == "/reset":
            messages = [*opening]
            say("a new dialog")
            continue
        if text.startswith("/"):
            say(f"{text.split()[0]} is not a command; {_HELP}")
            continue
        if not text:
            continue
        asked = [*messages, {"role": "user", "content": text}]
        answer = _answered(generator, asked, sampling, out)
        if answer is not None:
            messages = [*asked, {"role": "assistant", "content": answer}]
            turns += 1


def _answered(generator: TextGenerator, asked: list[dict[str, str]], sampling: Any, out: TextIO) -> str | None:
    """Write an answer as it arrives, until Ctrl-C, and return it. Return None after Ctrl-C, or after an error,
    which is shown."""
    pieces: list[str] = []
    stopped = False

    def interrupt(*_: object) -> None:
        nonlocal stopped
        if stopped or not pieces:
            raise KeyboardInterrupt  # what is waited for may take long
        stopped = True

    fault: DataError | ServerError | None = None
    try:
        with handled(interrupt, [signal.SIGINT]):
            for piece in generator.stream(asked, sampling):
                out.write(piece)
                out.flush()
                pieces.append(piece)
                if stopped:
                    break
    except KeyboardInterrupt:
        stopped = True
    except (DataError, ServerError) as error:
        fault = error
    if pieces or fault is None:
        out.write("\n")
        out.flush()
    if fault is None:
        return "".join(pieces) if pieces or not stopped else None
    say(f"error: {fault.message}\nremedy: {fault.remedy}{', or /reset' * isinstance(fault, DataError)}")
    return None
