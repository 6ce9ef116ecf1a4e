"""A command of deploykit: --json, --debug, error messages, progress on stderr."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shlex
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click

from deploykit.artifacts import write_refusal
from deploykit.errors import DeploykitError, Interrupted

Function = TypeVar("Function", bound=Callable[..., Any])
Result = tuple[Mapping[str, Any], str] | tuple[Mapping[str, Any], str, int]
"""The result of a command: the object that --json prints, the text that is printed without it, and the exit code if some rows
failed."""


def say(message: str) -> None:
    """Print progress to stderr, so that stdout contains only the result."""
    click.echo(message, err=True)


class Command(click.Command):
    """A command that refuses an option given twice, of which click would silently use the last value, and words that are not
    UTF-8: ONNX, safetensors and manifests cannot hold them."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        for word in args:
            _check_decoded(word, ctx)
        if not ctx.resilient_parsing:
            _, _, given = self.make_parser(ctx).parse_args(list(args))
            for option in given:
                if isinstance(option, click.Option) and _one_value(option) and given.count(option) > 1:
                    raise click.UsageError(f"{option.opts[0]} is given more than once; give it once", ctx)
        return super().parse_args(ctx, args)


def _check_decoded(word: str, ctx: click.Context) -> None:
    """Raise click.UsageError for a word that Python could not decode."""
    try:
        word.encode()
    except UnicodeEncodeError:
        data = os.fsencode(word)
    else:
        return
    try:
        shown = data.decode()
    except UnicodeDecodeError:
        shown = data.decode(errors="backslashreplace")
        raise click.UsageError(f"{shown} is not UTF-8; rename the file or folder, or correct the text", ctx) from None
    raise click.UsageError(f"the locale has no letters for {shown}; set LC_ALL=C.UTF-8", ctx)


def _one_value(option: click.Option) -> bool:
    """Return whether a second use of ``option`` may contradict the first. A switch without an opposite only repeats it."""
    return not (option.multiple or option.count or (option.is_flag and not option.secondary_opts))


class RecordedCommand(Command):
    """A command that remembers its command line, so that a report can show how to repeat the measurement."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[__name__] = shlex.join(["deploykit", str(ctx.info_name), *args])
        return super().parse_args(ctx, args)

    @staticmethod
    def command_line() -> str:
        """Return the running command as it was typed."""
        return str(click.get_current_context().meta[__name__])


def deploykit_command(**attributes: Any) -> Callable[[Callable[..., Result]], click.Command]:
    """Declare a command: add --json and --debug, print its result, and turn errors into messages."""

    def declare(function: Callable[..., Result]) -> click.Command:
        @functools.wraps(function)
        def run(*, as_json: bool, debug: bool, **options: Any) -> None:
            try:
                # Libraries may print to stdout, which is reserved for the result.
                with contextlib.redirect_stdout(sys.stderr), _short_thread_errors(not debug):
                    result, text, *code = function(**options)
            except DeploykitError as error:
                if debug:
                    raise
                _fail(error.message, error.remedy, error.exit_code, as_json=as_json)
            except (click.ClickException, click.exceptions.Exit, click.Abort):
                raise
            except Interrupted as stop:
                _fail(str(stop), None, stop.exit_code, as_json=as_json)
            except KeyboardInterrupt:
                _fail("interrupted", None, 130, as_json=as_json)
            except Exception as error:
                if debug:
                    raise
                if refused := write_refusal(error):
                    _fail(refused.message, refused.remedy, refused.exit_code, as_json=as_json)
                if isinstance(error, FileNotFoundError) and not _working_directory_exists():
                    _fail("the working directory was removed", "change to one that exists", 1, as_json=as_json)
                what = str(error).strip() or type(error).__name__
                _fail(f"{type(error).__name__}: {what}", "run it again with --debug for details", 1, as_json=as_json)
            _print(result if as_json else text, as_json=as_json)
            if any(code):
                sys.exit(code[0])

        run = click.option("--debug", is_flag=True, help="Show a traceback on errors.")(run)
        run = click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")(run)
        command: click.Command = click.command(**{"cls": Command, **attributes})(run)
        return command

    return declare


def _working_directory_exists() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True


def open_standard_streams() -> None:
    """Open standard streams that are closed (``>&-``) to /dev/null, for this program and those that it starts.

    Otherwise the next files that are opened get the numbers of the streams, and libraries print into these files.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode)  # noqa: SIM115
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)


@contextlib.contextmanager
def _short_thread_errors(short: bool) -> Iterator[None]:
    """Report in one line the exception that ended a thread of a library, such as the one that writes TensorBoard's file."""
    before = threading.excepthook
    if short:
        threading.excepthook = lambda failed: click.echo(
            f"warning: a thread ended: {failed.exc_type.__name__}: {failed.exc_value}", err=True
        )
    try:
        yield
    finally:
        threading.excepthook = before


def _print(shown: Any, *, as_json: bool) -> None:
    """Print a text, or with ``as_json`` an object, to stdout. Characters that its encoding lacks are escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    line = json.dumps(shown, ensure_ascii=False, allow_nan=False) if as_json else shown
    try:
        line.encode(encoding)
    except UnicodeEncodeError:
        line = json.dumps(shown) if as_json else shown.encode(encoding, "backslashreplace").decode(encoding)
    try:
        click.echo(line)
    except OSError as error:
        if refused := write_refusal(error, Path("stdout")):
            # Python would write the rest of the buffer again when it ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            _fail(refused.message, refused.remedy, refused.exit_code, as_json=False)
        raise


def _fail(message: str, remedy: str | None, exit_code: int, *, as_json: bool) -> NoReturn:
    from rich.console import Console
    from rich.text import Text

    # Colours only on a terminal, and not if NO_COLOR is set; lines are never broken.
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(Text.assemble(("error: ", "bold red"), message))
    if remedy:
        console.print(Text.assemble(("remedy: ", "bold"), remedy))
    if as_json:
        _print({"error": {"message": message, "remedy": remedy}}, as_json=True)
    sys.exit(exit_code)


class Option(click.Option):
    """An option that also accepts ``aliases``, its earlier names, which --help does not show."""

    def __init__(self, *arguments: Any, aliases: Sequence[str] = (), **attributes: Any) -> None:
        super().__init__(*arguments, **attributes)
        self.aliases = tuple(aliases)

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        shown = self.opts
        self.opts = [*shown, *self.aliases]
        try:
            super().add_to_parser(parser, ctx)
        finally:
            self.opts = shown


def option(*names: str, **attributes: Any) -> Callable[[Function], Function]:
    """Declare an option as ``click.option`` does, and add ``aliases``, names that --help does not show."""
    return click.option(*names, cls=Option, **attributes)


def human_bytes(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


@contextlib.contextmanager
def progress_bar(unit: str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar on stderr, if that is a terminal. Yields a function to call with (done, total)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(unit, total=None)

        def update(done: int, of: int) -> None:
            bar.update(task, completed=done, total=of)

        yield update
