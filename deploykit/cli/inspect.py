from __future__ import annotations

from pathlib import Path

import click

from deploykit.artifacts import load_manifest
from deploykit.cli.common import Result, deploykit_command, human_bytes
from deploykit.export.tables import render, render_calibration, render_searches
from deploykit.tasks import Classification, Task


@deploykit_command(help="Show what an artifact is, what made it, and verify each of its files.")
@click.argument("path", type=click.Path(path_type=Path))
def command(*, path: Path) -> Result:
    manifest = load_manifest(path)
    task = manifest.task
    lines = [
        f"{path}: {manifest.kind} for {task.name}, verified: every file matches its SHA-256",
        f"digest   {manifest.digest}",
        f"parent   {manifest.parent or '-'}",
        f"inputs   {manifest.inputs}",
        f"made     {manifest.created} with " + ", ".join(f"{k} {v}" for k, v in manifest.versions.items()),
        _task_line(task),
        "files",
        *(
            f"  {record.sha256[:16]}  {human_bytes(record.bytes):>9}  {name}"
            for name, record in sorted(manifest.files.items())
        ),
        "options",
        *(f"  {key} = {value}" for key, value in manifest.options.items()),
    ]
    if manifest.kind == "calibration":
        lines += render_calibration(manifest.metrics)
    if table := manifest.metrics.get("accuracy_table"):
        lines += render(table)
    lines += render_searches(manifest.metrics.get("quantization", {}).get("search", {}))
    for split in ("validation", "test"):
        scores = {name: manifest.metrics.get(split, {}).get(name) for name in ("accuracy", "macro_f1", "bleu", "chrf")}
        if any(value is not None for value in scores.values()):
            lines.append(f"{split}: " + ", ".join(f"{n} {v:.4f}" for n, v in scores.items() if v is not None))
    return {**manifest.to_json(), "path": str(path), "verified": True}, "\n".join(lines)


def _task_line(task: Task) -> str:
    if isinstance(task, Classification):
        multi = " (multi-label)" if task.multi_label else ""
        return f"labels   {', '.join(task.labels)}{multi}; at most {task.max_length} tokens"
    search = "greedy search" if task.generation.beam_size == 1 else f"{task.generation.beam_size} beams"
    return (
        f"language {task.source} to {task.target} ({task.family}), {task.vocabulary:,} pieces; at most "
        f"{task.max_source_length} tokens in and {task.generation.max_length} out, {search}"
    )
