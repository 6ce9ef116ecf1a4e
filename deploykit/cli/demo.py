from __future__ import annotations

from pathlib import Path

import click

from deploykit.cli_parts.command import Result, deploykit_command, option, say
from deploykit.cli_parts.shared_options import MODEL_REPOSITORY_HELP
from deploykit.metric_titles import value_text
from deploykit.tasks.registry import get_task, task_names
from deploykit.tasks.types import Demonstrating
from deploykit.text_table import text_table

_COLUMNS = {"accuracy": ("accuracy", 4), "macro_f1": ("macro-F1", 4), "bleu": ("BLEU", 2), "exact_match": ("exact match", 3), "first_word": ("first word", 3), "chrf": ("chrF", 2),
            "p50_ms": ("p50 ms", 2), "p99_ms": ("p99 ms", 2), "sentences_per_s": ("sentences/s", 0),
            "size_mb": ("size MB", 1), "memory_mb": ("memory MB", 0)}  # fmt: skip

_TASKS = {task.demo: task for task in map(get_task, task_names()) if isinstance(task, Demonstrating)}


@deploykit_command(help="Run all stages on real data, to a measured INT8 classifier, translator or language model.")
@click.option("--recipe", type=click.Choice(list(_TASKS)), default="sentiment", show_default=True,
              help="Demo to run.")  # fmt: skip
@option("--output-dir", "out", aliases=["--out"], type=click.Path(path_type=Path), default=Path("demo"), show_default=True,
        help="Folder to write to.")  # fmt: skip
@option("--model-repository", "repository", aliases=["--repository"], type=click.Path(path_type=Path),
        show_default="OUTPUT_DIR/model_repository", help=MODEL_REPOSITORY_HELP)  # fmt: skip
@option("--max-train-samples", "max_rows", aliases=["--max-rows"], type=int,
        show_default="8000 tweets, 1300 commands; otherwise all", help="Maximum rows of the training data, before splits; 0: all.")  # fmt: skip
@option("--seconds", type=click.FloatRange(0.05), default=2.0, show_default=True, help="Duration of each measurement.")
def command(*, recipe: str, out: Path, repository: Path | None, max_rows: int | None, seconds: float) -> Result:
    from deploykit.demo import check_dependencies, run_demo

    check_dependencies()
    chosen = _TASKS[recipe].demo_recipe(out, max_rows=max_rows, say=say)
    result = run_demo(chosen, out, repository or out / "model_repository", seconds=seconds, say=say)
    columns = {key: shown for key, shown in _COLUMNS.items() if key in result["table"][0]}
    rows = (
        [
            line["name"],
            *(
                "-" if line[key] is None else value_text(line[key], line["intervals"].get(key), digits)
                for key, (_, digits) in columns.items()
            ),
        ]
        for line in result["table"]
    )
    return result, (
        f"{text_table(['model', *(title for title, _ in columns.values())], rows)}\n"
        "p50 and p99: one sentence at a time; sentences/s: at the fastest concurrency tried\n\n"
        f"{result['seconds']:.0f} s in all; open {result['report']}"
    )
