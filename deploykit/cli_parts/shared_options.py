"""Options and arguments that several commands share."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deploykit.cli_parts.command import Result, option
from deploykit.data.reading import ON_ERROR, QUOTINGS, Reading, flag
from deploykit.errors import UsageError
from deploykit.runtime.serving_settings import DEFAULT_URL

if TYPE_CHECKING:
    from deploykit.tasks.protocol import Task

SERVER_URL = click.option(
    "--url", default=DEFAULT_URL, show_default=True, help="HTTP address of the server, if the model is served."
)
ENGINE = click.option(
    "--engine", default="auto", show_default=True, help="Engine: auto, tensorrt, native, openvino, onnxruntime or cuda."
)
PRECISION = click.option(
    "--precision",
    default="auto",
    show_default=True,
    help="Precision: auto (INT8 if available), int8, int4, fp16, bf16 or fp32.",
)
THREADS = click.option("--threads", type=click.IntRange(1), help="Number of CPU threads (default: all CPUs).")
DRAFT_MODEL = option(
    "--draft-model",
    aliases=["--model-draft", "--speculative-model", "--assistant-model"],
    metavar="EXPORT",
    help="[text generation] Export of a smaller model with the same tokenizer, which guesses TARGET's next tokens: the same answers in fewer steps.",
)
METHODS = click.Choice(
    ["minmax", "entropy", "percentile", "mse"]
)  # as in quantization.calibration, which is slow to import
CALIBRATION_SPLIT = click.option("--calibration-split", show_default="train", help="Split of the run to calibrate on.")
CALIBRATION_DATA = click.option(
    "--calibration-data", help="File of rows to calibrate on, instead of a split of the run."
)
CALIBRATION = click.option(
    "--calibration", hidden=True
)  # the earlier option for a split, a file or a saved calibration
CALIBRATION_ROWS = click.option(
    "--calibration-rows", type=int, show_default="512", help="Number of calibration rows to use, at most."
)
SOURCE_LANG = option(
    "--source-lang",
    aliases=["--source"],
    help="Source language, if deploykit did not train the translation checkpoint.",
)
TEXT_COLUMN = click.option(
    "--text-column", multiple=True,
    help="Text column of a classifier's rows (default: the training columns, or detected). Given twice for a checkpoint that deploykit "
    "did not train, it names a pair of texts.",
)  # fmt: skip
LABEL_COLUMN = click.option(
    "--label-column",
    multiple=True,
    help="Label column of a classifier's rows (default: the training columns, or detected).",
)
TARGET_LANG_HELP = "Target language, in the same case."
OUTPUT_DIR = option("--output-dir", "out", aliases=["--out"], required=True, type=click.Path(path_type=Path),
                    help="Folder to write to.")  # fmt: skip
MODEL_REPOSITORY_HELP = "Model repository: the folder of packaged models."
REQUIRE_SIGNATURE = click.option(
    "--require-signature",
    metavar="PUBLIC_KEY",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Refuse artifacts that are not signed with the private key of this public key (PEM).",
)
MODEL_REPOSITORY = option(
    "--model-repository", "repository", aliases=["--repository"], type=click.Path(path_type=Path),
    default=Path("model_repository"), show_default=True, help=MODEL_REPOSITORY_HELP,
)  # fmt: skip
NAME_HELP = "Name of the model, for clients."
LONG_INPUT_HELP = "Split texts that are too long for the model, at sentence ends, or refuse them."
SPLIT_HELP = "Translate each sentence of a text, each paragraph (line), or the whole text at once."
NUM_PROMPTS = option("--num-prompts", "max_rows", aliases=["--max-rows"], type=click.IntRange(1), default=2000,
                     show_default=True, help="Number of rows to use, at most.")  # fmt: skip
FORCE = click.option("--force", is_flag=True, help="Replace an existing destination.")


_SEARCH: Mapping[str, Mapping[str, Any]] = {
    "num_beams": {"type": int, "aliases": ["--beam-size"], "help": "Number of beams; 1 is greedy search."},
    "max_new_tokens": {"type": int, "help": "Maximum number of tokens to generate."},
    "min_new_tokens": {"type": int, "help": "Minimum length of a translation, in tokens."},
    "length_penalty": {
        "type": float,
        "help": "Divide a translation's score by its length to this power.",
    },
    "early_stopping": {
        "type": click.Choice(["true", "false", "never"]),
        "help": "When beam search stops: at enough finished hypotheses (true), when a better one is unlikely (false), "
        "or when it is impossible (never).",
    },
    "no_repeat_ngram_size": {"type": int, "help": "Never repeat an n-gram of this size; 0: off."},
    "repetition_penalty": {"type": float, "help": "Divide the scores of tokens that already occurred; 1: off."},
}


def model_options(function: Callable[..., Result]) -> Callable[..., Result]:
    """Add the options that say where and how a model is opened: --url, --engine, --precision, --threads."""
    for add in (THREADS, PRECISION, ENGINE, SERVER_URL):
        function = add(function)
    return function


def generation_options(function: Callable[..., Result]) -> Callable[..., Result]:
    """Add the search options to a command, and pass those that were given as ``generation``."""

    @functools.wraps(function)
    def run(**options: Any) -> Result:
        values = {name: options.pop(name) for name in _SEARCH}
        return function(generation={name: value for name, value in values.items() if value is not None}, **options)

    for name, attributes in reversed(list(_SEARCH.items())):
        run = option(flag(name), name, **attributes)(run)
    return run


class _Names(click.ParamType):  # type: ignore[type-arg]
    """Names separated by commas."""

    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        return tuple(name.strip() for name in value.split(",")) if isinstance(value, str) else tuple(value)


def _tab(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    r"""Return a delimiter; a tab for \t, as shells leave it."""
    return "\t" if value == r"\t" else value


_READING: Mapping[str, Mapping[str, Any]] = {
    "encoding": {"help": "Encoding of text files (default: UTF-8, or as the byte order mark says)."},
    "delimiter": {"callback": _tab, "help": r"Character between the fields of .csv and .tsv files; \t is a tab (default: detected)."},
    "quoting": {"type": click.Choice(QUOTINGS), "help": "Quotes in .csv and .tsv files are characters like others (none), or enclose fields (minimal; "
                "default: detected)."},
    "no_header": {"is_flag": True, "help": "The first row of .csv, .tsv and .xlsx files is data; columns are 1, 2, …, or --columns."},
    "columns": {"type": _Names(), "default": (), "metavar": "NAME,NAME", "help": "All columns of a file without a header, in order."},
}  # fmt: skip


def reading_fields(function: Callable[..., Result], on_error: str = "stop") -> Callable[..., Result]:
    """Add the options that say how to read files of rows; they come as the fields of ``Reading``."""
    function = click.option(
        "--on-error", type=click.Choice(ON_ERROR), default=on_error, show_default=True,
        help="Stop at a row that is malformed or cannot be used, or skip and report it.",
    )(function)  # fmt: skip
    for name, attributes in reversed(list(_READING.items())):
        function = click.option(flag(name), name, **attributes)(function)
    return function


def reading_options(*, on_error: str = "stop") -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Add the same options, and pass them as one ``Reading``. Use it above ``column_options``, which passes ``columns``."""

    def declare(function: Callable[..., Result]) -> Callable[..., Result]:
        @functools.wraps(function)
        def run(**options: Any) -> Result:
            reading = Reading(**{field.name: options.pop(field.name) for field in dataclasses.fields(Reading)})
            reading.check()
            return function(reading=reading, **options)

        return reading_fields(run, on_error)

    return declare


_COLUMNS: Mapping[str, Mapping[str, Any]] = {
    "text_column": {"multiple": True, "help": "Text column (default: the training columns, or detected)."},
    "label_column": {"multiple": True, "help": "Label column (default: the training columns, or detected)."},
    "source_column": {"help": "Source column (default: the training column, or detected)."},
    "target_column": {"help": "Target column (default: the training column, or detected)."},
    "prompt_column": {"help": "Prompt column (default: the training column, or detected)."},
    "completion_column": {"help": "Completion column (default: the training column, or detected)."},
}


def column_options(*, inputs_only: bool = False) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Add the options that name the columns of a data file, of every task; they come as ``columns``.

    ``evaluate`` alone has the other options of a task's ``columns`` (``measuring_options``).

    With ``inputs_only``, add only the columns of the texts, for a command that reads no right answers.
    """
    from deploykit.tasks.registry import get_task, task_names

    tasks = [get_task(name) for name in task_names()]
    found = (c for task in tasks for c in (task.input_columns if inputs_only else task.columns))
    names = list(dict.fromkeys(name for name in found if name.endswith("_column")))

    def declare(function: Callable[..., Result]) -> Callable[..., Result]:
        @functools.wraps(function)
        def run(**options: Any) -> Result:
            return function(columns={name: options.pop(name) for name in names}, **options)

        for name in reversed(names):
            attributes = _COLUMNS.get(
                name, {"help": "Column of that name (default: the training column, or detected)."}
            )
            run = click.option(flag(name), name, **attributes)(run)
        return run

    return declare


def measuring_options(function: Callable[..., Result]) -> Callable[..., Result]:
    """Add the options of the tasks' ``columns`` that name no column, with the help that they have in ``finetune``; they come
    as ``measuring``."""
    from deploykit.tasks.registry import get_task, task_names

    found: dict[str, Mapping[str, Any]] = {}
    for task in map(get_task, task_names()):
        for name in task.columns:
            if not name.endswith("_column"):
                found.setdefault(name, task.options().__dataclass_fields__[name].metadata)

    @functools.wraps(function)
    def run(**options: Any) -> Result:
        return function(measuring={name: options.pop(name) for name in found}, **options)

    for name, metadata in reversed(found.items()):
        kind = click.Choice(metadata["choices"]) if metadata["choices"] else None
        run = click.option(flag(name), name, type=kind, help=metadata["help"])(run)
    return run


def target_and_texts(function: Callable[..., Result]) -> Callable[..., Result]:
    """Add the arguments TARGET, which the function takes as ``model``, and TEXTS. --model is an earlier way to give TARGET."""

    @functools.wraps(function)
    def run(*, target: str | None, model: str | None, texts: tuple[str, ...], **options: Any) -> Result:
        if model is None and target is None:
            raise UsageError(
                "TARGET is missing", "name a checkpoint, an export, a packaged model's version, or a served model"
            )
        if model is not None:
            return function(model=model, texts=texts if target is None else (target, *texts), **options)
        return function(model=target, texts=texts, **options)

    for argument in (click.argument("texts", nargs=-1), click.argument("target", required=False, metavar="TARGET")):
        run = argument(run)
    return option("--model", hidden=True)(run)


def with_calibration(values: dict[str, Any]) -> dict[str, Any]:
    """Return the options, with --calibration, an earlier name of three options, replaced by the option that it means."""
    from deploykit.graphs.export_options import SPLITS
    from deploykit.quantization.calibration import is_saved

    given = values.pop("calibration")
    if given is None:
        return values
    if "calib" in values and is_saved(given):
        return {**values, "calib": given}
    is_split = given in SPLITS and not Path(given).exists()
    return {**values, "calibration_split" if is_split else "calibration_data": given}


def columns_for(task: Task, columns: Mapping[str, Any], generation: Mapping[str, Any] = {}) -> dict[str, Any]:
    """Return the options that a model of ``task`` has. Raises UsageError if a column or search option does not apply to it."""
    from deploykit.training.options import fit_multiple

    searches = task.facts.graph_kind != "encoder"
    given = {name: value for name, value in columns.items() if name not in task.columns}
    for name, value in {**given, **({} if searches else generation)}.items():
        if value not in (None, ()):
            raise UsageError(f"{flag(name)} does not apply to a model that {task.does}", "leave it out")
    return fit_multiple(task.options(), {name: value for name, value in columns.items() if name in task.columns})


def check_page(name: str, page: Path | None) -> None:
    """Raise UsageError for an HTML page without the suffix of one: it may be a file of rows, which the page would replace."""
    if page is not None and page.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"{name} {page}: an HTML page is written", "give a name that ends in .html")
