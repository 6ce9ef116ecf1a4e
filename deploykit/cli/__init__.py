"""The command line. Commands parse, call and print; each imports heavy packages only when it runs.

A command for models of one task is in the folder of that task.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import click

from deploykit import __version__
from deploykit.cli_parts.command import open_standard_streams
from deploykit.errors import DeploykitError

# command -> its line in `deploykit --help`; the module is imported only when the command runs
_COMMANDS: Mapping[str, str] = {
    "finetune": "Fine-tune a Hugging Face checkpoint on labelled text.",
    "evaluate": "Measure a checkpoint, an export or a served model on labelled rows.",
    "explain": "Show which words led to an answer.",
    "calibrate": "Collect the activation ranges that INT8 needs, from real rows.",
    "export": "Export a checkpoint to ONNX, optionally calibrated INT8.",
    "package": "Write an export as a Triton model.",
    "sign": "Sign an export, a model or a bundle with a private key.",
    "bundle": "Pack an export into one file that a Jetson builds and serves.",
    "unpack": "Verify and unpack a bundle.",
    "serve": "Serve a model repository with Triton.",
    "top": "Show rates, latencies and queues of a running server.",
    "predict": "Answer texts with a served or local model of any task.",
    "bench": "Measure speed and memory under load.",
    "compare": "Print the figures that changed between two measurements.",
    "tune": "Find the fastest serving settings within a latency limit.",
    "inspect": "Show an artifact's manifest, and verify its files.",
    "doctor": "Show what this machine has, and what each command still needs.",
    "demo": "Run all stages on real data.",
}
_AFTER_TASKS = "bench"
"""The commands of the tasks are listed before this one."""


class LazyGroup(click.Group):
    """A group that imports a command's module only when that command runs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_lines())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        try:
            module_name = _module(cmd_name)
            if module_name is None:
                return None
            module = importlib.import_module(module_name)
        except DeploykitError as error:  # a package that adds a task cannot be loaded
            raise click.UsageError(f"{error.message}; {error.remedy}", ctx) from error
        command: click.Command = module.command
        return command

    def main(self, *args: Any, **attributes: Any) -> Any:
        open_standard_streams()
        return super().main(*args, **attributes)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # while the command's module was imported: a running command says so itself
            click.echo("error: interrupted", err=True)
            ctx.exit(130)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_lines().items()))


def _module(name: str) -> str | None:
    """Return the module of a command, or None if there is no such command."""
    if name in _COMMANDS:
        return f"deploykit.cli.{name}"
    from deploykit.tasks.registry import task_commands

    return next((command.module for other, command in task_commands() if other == name), None)


def _lines() -> dict[str, str]:
    """Return the line of each command in ``deploykit --help``."""
    from deploykit.tasks.registry import loadable_commands

    of_tasks = {name: command.line for name, command in loadable_commands().items()}
    lines: dict[str, str] = {}
    for name, line in _COMMANDS.items():
        lines |= of_tasks if name == _AFTER_TASKS else {}
        lines[name] = line
    return {**lines, **_COMMANDS}


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="deploykit")
def main() -> None:
    """Fine-tune, export, quantize, serve and measure text models."""
