"""What all commands share: --json, --debug, errors as messages, progress on stderr."""

from __future__ import annotations

import contextlib
import functools
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import click

from deploykit.errors import DeploykitError, UsageError

if TYPE_CHECKING:
    from deploykit.tasks.protocol import Task

Result = tuple[Mapping[str, Any], str]
"""What a command returns: the object that --json prints, and the text printed otherwise."""


def say(message: str) -> None:
    """Progress, for a person: on stderr, so that stdout holds the result alone."""
    click.echo(message, err=True)


class WithItsWords(click.Command):
    """Remembers what was typed: a report tells how to repeat the measurement."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[__name__] = shlex.join(["deploykit", str(ctx.info_name), *args])
        return super().parse_args(ctx, args)

    @staticmethod
    def words() -> str:
        """The command that runs, as it was typed."""
        return str(click.get_current_context().meta[__name__])


def deploykit_command(**attributes: Any) -> Callable[[Callable[..., Result]], click.Command]:
    """Declare a command: adds --json and --debug, prints its result, turns errors into messages."""

    def declare(function: Callable[..., Result]) -> click.Command:
        @functools.wraps(function)
        def run(*, as_json: bool, debug: bool, **options: Any) -> None:
            try:
                # Libraries print where they like; stdout is for the result.
                with contextlib.redirect_stdout(sys.stderr):
                    result, text = function(**options)
            except DeploykitError as error:
                if debug:
                    raise
                _fail(error.message, error.remedy, error.exit_code, as_json=as_json)
            except (click.ClickException, click.exceptions.Exit, click.Abort):
                raise
            except KeyboardInterrupt:
                _fail("interrupted", None, 130, as_json=as_json)
            except Exception as error:
                if debug:
                    raise
                what = str(error).strip() or type(error).__name__
                _fail(f"{type(error).__name__}: {what}", "run it again with --debug for details", 1, as_json=as_json)
            click.echo(json.dumps(result, ensure_ascii=False, allow_nan=False) if as_json else text)

        run = click.option("--debug", is_flag=True, help="Show a traceback on errors.")(run)
        run = click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")(run)
        command: click.Command = click.command(**attributes)(run)
        return command

    return declare


def _fail(message: str, remedy: str | None, exit_code: int, *, as_json: bool) -> NoReturn:
    click.secho(f"error: {message}", err=True, fg="red")
    if remedy:
        click.echo(f"remedy: {remedy}", err=True)
    if as_json:
        click.echo(json.dumps({"error": {"message": message, "remedy": remedy}}, ensure_ascii=False))
    sys.exit(exit_code)


def human_bytes(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


SERVER_URL = click.option(
    "--url", default="http://127.0.0.1:8000", show_default=True, help="HTTP address of the server, for a served model."
)
ENGINE = click.option(
    "--engine", default="auto", show_default=True, help="auto, tensorrt, native, openvino, onnxruntime or cuda."
)
PRECISION = click.option(
    "--precision", default="auto", show_default=True, help="auto (INT8 if there is one), int8, int4, fp16, bf16, fp32."
)
THREADS = click.option("--threads", type=click.IntRange(1), help="CPU threads (default: all).")
ENCODING = click.option("--encoding", help="Of text files (default: UTF-8, or what a byte order mark says).")
METHODS = click.Choice(["minmax", "entropy", "percentile", "mse"])  # calibration's, whose module takes long to import
CALIBRATION_ROWS = click.option(
    "--calibration-rows", type=int, default=512, show_default=True, help="Most of them to use."
)
FORCE = click.option("--force", is_flag=True, help="Replace what stands at the destination.")


_SEARCH: Mapping[str, Mapping[str, Any]] = {
    "beam_size": {"type": int, "help": "Hypotheses kept side by side; 1 is greedy search."},
    "max_new_tokens": {"type": int, "help": "Longest translation or answer, in tokens."},
    "min_new_tokens": {"type": int, "help": "Shortest translation, in tokens."},
    "length_penalty": {"type": float, "help": "Exponent of the length that scores are divided by."},
    "early_stopping": {"type": click.Choice(["true", "false", "never"]), "help": "When a beam is full."},
    "no_repeat_ngram_size": {"type": int, "help": "No n-gram of this size comes twice; 0: off."},
    "repetition_penalty": {"type": float, "help": "Divides the scores of tokens that came before; 1: off."},
}


def generation_options(function: Callable[..., Result]) -> Callable[..., Result]:
    """Options of how to search for a translation (default: the model's own); those given come as ``generation``."""

    @functools.wraps(function)
    def run(**options: Any) -> Result:
        values = {name: options.pop(name) for name in _SEARCH}
        return function(generation={name: value for name, value in values.items() if value is not None}, **options)

    for name, attributes in reversed(list(_SEARCH.items())):
        run = click.option(f"--{name.replace('_', '-')}", name, **attributes)(run)
    return run


def refuse_columns(task: Task, columns: Mapping[str, Any], generation: Mapping[str, Any] = {}) -> None:
    """Raise UsageError if a column or search option is given that does nothing for a model of ``task``."""
    searches = task.facts.graph_kind != "encoder"
    given = {name: value for name, value in columns.items() if name not in task.columns}
    for name, value in {**given, **({} if searches else generation)}.items():
        if value not in (None, ()):
            raise UsageError(f"--{name.replace('_', '-')} is not for a model that {task.does}", "leave it out")


@contextlib.contextmanager
def progress_bar(unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr; yields what to call with (done, in all)."""
    from tqdm import tqdm

    with tqdm(unit=f" {unit}", file=sys.stderr, leave=False, disable=None) as bar:

        def update(done: int, of: int) -> None:
            bar.total = of
            bar.update(done - bar.n)

        yield update
