from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deploykit.cli_parts.command import Command, Option, Result, deploykit_command, say
from deploykit.cli_parts.shared_options import FORCE, OUTPUT_DIR, reading_fields
from deploykit.data.reading import Reading, flag
from deploykit.errors import UsageError
from deploykit.hyperparameters.options import SearchOptions
from deploykit.metric_titles import shown_metrics, title_of, value_text
from deploykit.stages.finetune_options import OPTIONS, STUDENT, make_options, read_toml
from deploykit.tasks.registry import DEFAULT, task_of
from deploykit.text_table import text_table
from deploykit.training.options import RENAMED, FinetuneOptions

if TYPE_CHECKING:
    from deploykit.stages.finetune import Finetuned

_FEW_ROWS = 30


def _load_config(ctx: click.Context, _: click.Parameter, path: Path | None) -> None:
    if path is not None:
        try:
            # Click takes no empty list for an option of two values.
            ctx.default_map = {name: value for name, value in read_toml(path).items() if value != []}
        except UsageError as error:
            raise click.UsageError(str(error), ctx) from error


class _Command(Command):
    """A command that shows its options in sections: those of every task, then those of each."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = None if isinstance(parameter, click.Argument) else parameter.get_help_record(ctx)
            if record is not None:
                sections.setdefault(getattr(parameter, "section", "Options"), []).append(record)
        for section, records in sections.items():
            with formatter.section(section):
                formatter.write_dl(records)


class _FieldOption(Option):
    """An option that sets the field of the same name, and is None if it is not given."""

    def __init__(self, *names: str, section: str, **attributes: Any) -> None:
        super().__init__(*names, default=None, **attributes)
        self.section = section


def _field_options(function: Callable[..., Result]) -> Callable[..., Result]:
    """Declare an option for each field of the tasks' options, those of other packages' tasks included."""
    kinds: list[type[FinetuneOptions]] = [FinetuneOptions, *OPTIONS.values()]
    names = dict.fromkeys(field.name for kind in kinds for field in fields(kind))
    declared = {"model", "task", *(field.name for field in fields(Reading))}
    for name in reversed([name for name in names if name not in declared]):
        function = _field_option(name)(function)
    return function


def _field_option(name: str) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    owners = {task: field for task, kind in OPTIONS.items() for field in fields(kind) if field.name == name}
    field = next(iter(owners.values()))
    metadata: Mapping[str, Any] = next(
        (
            found.metadata
            for task in owners
            for kind in OPTIONS[task].__mro__
            if is_dataclass(kind) and (found := kind.__dataclass_fields__.get(name)) is not None and found.metadata
        ),
        {},
    )
    aliases = [flag(old) for old, new in RENAMED.items() if new == name]
    attributes: dict[str, Any] = {"aliases": aliases, "hidden": metadata.get("hidden", False)}
    typed = flag(name)
    kind = str(field.type).partition(" ")[0]
    if isinstance(field.default, bool):
        attributes["is_flag"] = True
        typed += f"/--no-{typed[2:]}" if field.default else ""
    elif metadata.get("choices"):
        attributes["type"] = click.Choice(metadata["choices"])
    elif values := metadata.get("values"):
        attributes |= {"nargs": len(values), "metavar": " ".join(values)}
    elif any(isinstance(own.default, tuple) for own in owners.values()):
        attributes["multiple"] = True
    elif kind in ("int", "float"):
        attributes["type"] = {"int": int, "float": float}[kind]
    section = f"Options of --task {next(iter(owners))}" if len(owners) == 1 else "Options of a run"
    text = _help(metadata.get("help", ""), {task: field.default for task, field in owners.items()})
    return click.option(typed, name, cls=_FieldOption, section=section, help=text, **attributes)


def _search_options(function: Callable[..., Result]) -> Callable[..., Result]:
    """Declare an option for each field of ``SearchOptions``."""
    for field in reversed(fields(SearchOptions)):
        metadata, default = field.metadata, field.default or None
        attributes: dict[str, Any] = {"type": click.Choice(metadata["choices"])} if metadata["choices"] else {}
        if isinstance(field.default, int):
            attributes = {"type": int, "metavar": "N"}
        shown = f"  [default: {default}]" if default is not None else ""
        function = click.option(
            flag(field.name), field.name, cls=_FieldOption, section="Options of a search", help=metadata["help"] + shown,
            **attributes,
        )(function)  # fmt: skip
    return function


def _help(text: str, defaults: Mapping[str, Any]) -> str:
    """Return the help of an option whose tasks have these defaults."""
    if 1 < len(defaults) < len(OPTIONS):
        text = f"[{', '.join(defaults)}] {text}"
    told = {
        task: str(value) for task, value in defaults.items() if value not in (None, (), "", " ") and value is not False
    }
    values = list(told.values())
    if len(set(values)) > 1:
        values = [f"{value} ({task})" for task, value in told.items()]
    if values and "(default:" not in text:
        text += f"  [default: {', '.join(dict.fromkeys(values))}]"
    return text


@deploykit_command(
    cls=_Command,
    help="Fine-tune TARGET, the folder of a Hugging Face checkpoint or a hub id, on labelled text, on translations, on questions with answers, or on prompts and answers. For text-generation TARGET may be a .gguf file.",
)
@click.argument("model", metavar="[TARGET]", required=False)
@click.option("--model", "earlier_model", hidden=True)
@click.option("--config", type=click.Path(path_type=Path), is_eager=True, expose_value=False, callback=_load_config,
              help="TOML file of these options; the command line wins.")  # fmt: skip
@click.option("--task", type=click.Choice(list(OPTIONS)), default=DEFAULT, show_default=True)
@OUTPUT_DIR
@reading_fields
@click.option("--restart", is_flag=True, help="Start over instead of continuing a killed run.")
@FORCE
@click.option(
    "--folds",
    type=int,
    default=0,
    metavar="K",
    help="Also cross-validate: train K times, each time on all folds of the rows except one.",
)
@click.option(
    "--learning-curve",
    "curve",
    is_flag=True,
    help="Also train on 10 to 75 % of the rows, and estimate the gain from more rows.",
)
@click.option(
    "--processes",
    type=int,
    default=1,
    metavar="N",
    help="Train in N processes that share each step; on GPUs, one process per GPU.",
)
@click.option(
    flag(STUDENT),
    cls=_FieldOption,
    section="Options of a run",
    metavar="layers=N|MODEL",
    help="[classification, translation, text-generation] Train a smaller model: layers=N keeps N layers, evenly spaced, of TARGET, "
    "without TARGET of the teacher; of a translator N of each side, or of the decoder M: layers=N,decoder=M. Or a checkpoint in place of TARGET.",
)
@_search_options
@_field_options
def command(
    *,
    out: Path,
    force: bool,
    restart: bool,
    folds: int,
    curve: bool,
    processes: int,
    model: str | None,
    earlier_model: str | None,
    **values: Any,
) -> Result:
    if model is not None and earlier_model is not None:
        raise UsageError(f"two checkpoints are given: {model} and {earlier_model}", "name one")
    given = {**values, "model": model if earlier_model is None else earlier_model}
    given = {name: value for name, value in given.items() if value not in (None, ())}
    chosen = SearchOptions(
        **{field.name: given.pop(field.name) for field in fields(SearchOptions) if field.name in given}
    )
    options = make_options(given)
    chosen.check(options)

    from deploykit.stages.finetune_processes import check_processes, finetune_together
    from deploykit.stages.repeated_runs import check_repeats, repeat
    from deploykit.training.rows import held_out

    check_repeats(options, folds, curve, searches=bool(chosen.search))
    check_processes(processes, searches=bool(chosen.search), repeats=bool(folds or curve))
    more: dict[str, Any] = {}
    if chosen.search:
        from deploykit.hyperparameters.run import PAGE, search

        found = search(options, chosen, out, force=force, restart=restart, say=say)
        done, more = found.best, {"search": {**found.record, "folder": str(found.folder)}}
        say(f"{found.folder / PAGE}: {len(found.record['runs'])} runs, the best is run {found.record['best']}")
    elif processes > 1:
        done = finetune_together(options, processes, out, force=force, restart=restart, say=say)
    else:
        from deploykit.stages.finetune import finetune

        done = finetune(options, out, force=force, restart=restart, say=say)
        done = repeat(options, done, out, folds=folds, curve=curve, say=say)
        repeats = {"folds": done.folds, "learning_curve": done.learning_curve}
        more = {name: value for name, value in repeats.items() if value is not None}
    metrics = done.manifest.metrics
    measured = held_out(metrics)
    own, text = task_of(done.manifest.task).result(done.manifest.task, metrics, measured)
    record = {
        "out": str(out),
        "reused": done.reused,
        "digest": done.manifest.digest,
        **own,
        "rows": metrics["rows"],
        "cleaning": metrics["cleaning"],
        "recipe": metrics.get("recipe", {}),
        "metrics": metrics.get(measured),
        **more,
    }
    head = f"{out}: {'reused, made before from the same inputs' if done.reused else 'written'}"
    if not measured:
        text = "no rows were held out: nothing was measured"
    else:
        count = metrics["rows"][measured]
        text = f"on {count:,} {measured} rows:\n{text}"
        if count < _FEW_ROWS:
            text += "\nso few rows say little: give more with --test, a larger --test-fraction, or train --folds 5"
    return record, "\n".join([head, text, *_repeats_text(done, task_of(done.manifest.task).headline)])


def _repeats_text(done: Finetuned, headline: str) -> Iterator[str]:
    """Yield lines on cross-validation and the learning curve, if there are any."""
    if done.folds is not None:
        yield f"\n{len(done.folds['folds'])} folds, mean ± standard deviation:"
        for name, title in shown_metrics(done.folds["mean"], headline).items():
            yield f"{title} {done.folds['mean'][name]:.4f} ± {done.folds['deviation'][name]:.4f}"
    if done.learning_curve is not None:
        curve = done.learning_curve
        points = [[f"{point['rows']:,}", value_text(point["value"], point["interval"])] for point in curve["points"]]
        if curve["expected"] is not None:
            points.append([f"{2 * curve['points'][-1]['rows']:,} (expected)", f"{curve['expected']:.4f}"])
        yield f"\n{text_table(['training rows', title_of(curve['metric'])], points)}"
