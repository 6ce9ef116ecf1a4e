"""The command line. Commands parse, call and print; each loads its heavy imports when it runs."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

import click

from deploykit import __version__

# command -> the line `deploykit --help` shows; its module is imported only when it is used
_COMMANDS: Mapping[str, str] = {
    "finetune": "Fine-tune a Hugging Face checkpoint on labelled text.",
    "evaluate": "Measure a checkpoint, an export or a served model on labelled rows.",
    "calibrate": "Find the activation ranges that INT8 needs, from real rows.",
    "export": "Export a checkpoint to ONNX, optionally calibrated INT8.",
    "package": "Write an export as a Triton model.",
    "bundle": "Write an export as one file for a Jetson, which builds and serves it.",
    "serve": "Serve a model repository with Triton.",
    "predict": "Classify texts with any model, served or not.",
    "translate": "Translate texts with any translation model, served or not.",
    "generate": "Answer prompts with any language model.",
    "bench": "Measure speed and memory under load.",
    "tune": "Find the settings that serve a packaged model best on this machine.",
    "inspect": "Show what an artifact is, and verify it.",
    "doctor": "Show what this machine has and lacks.",
    "demo": "Run the whole road on real data.",
}


class LazyGroup(click.Group):
    """Knows its commands by name; imports the module of the one that is run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"deploykit.cli.{cmd_name}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="deploykit")
def main() -> None:
    """From labelled text to a model that answers in production."""
