from __future__ import annotations

from pathlib import Path

import click

from deploykit.cli.common import Result, deploykit_command, say


@deploykit_command(help="Run the whole road on real data: tweets to a served, measured INT8 classifier.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("demo"), show_default=True)
@click.option("--repository", type=click.Path(path_type=Path), help="(default: OUT/model_repository)")
@click.option("--max-rows", type=click.IntRange(300), default=10_000, show_default=True, help="Tweets to use.")
def command(*, out: Path, repository: Path | None, max_rows: int) -> Result:
    from deploykit.demo import check_dependencies, run_demo

    check_dependencies()
    result = run_demo(out, repository or out / "model_repository", max_rows=max_rows, say=say)
    heads = ("accuracy", "macro-F1", "p50 ms", "p99 ms", "sentences/s", "size MB", "memory MB")
    lines = [f"{'':<28}" + "".join(f"{head:>13}" for head in heads)]
    for line in result["table"]:
        cells = (
            f"{line['accuracy']:.4f}",
            f"{line['macro_f1']:.4f}",
            f"{line['p50_ms']:.2f}",
            f"{line['p99_ms']:.2f}",
            f"{line['sentences_per_s']:.0f}",
            "-" if line["size_mb"] is None else f"{line['size_mb']:.1f}",
            "-" if line["memory_mb"] is None else f"{line['memory_mb']:.0f}",
        )
        lines.append(f"{line['name']:<28}" + "".join(f"{cell:>13}" for cell in cells))
    lines.append("p50 and p99: one sentence at a time; sentences/s: the best of the concurrencies tried")
    return result, "\n".join([*lines, f"\n{result['seconds']:.0f} s in all; open {result['report']}"])
