from __future__ import annotations

from pathlib import Path

import click

from deploykit.artifacts import load_manifest
from deploykit.cli_parts.command import Result, deploykit_command, human_bytes
from deploykit.metric_titles import TITLES, with_interval
from deploykit.quantization.tables import render, render_calibration, render_searches
from deploykit.tasks.registry import task_of


@deploykit_command(help="Show an artifact's manifest, and verify each of its files.")
@click.argument("path", metavar="TARGET", type=click.Path(path_type=Path))
def command(*, path: Path) -> Result:
    manifest = load_manifest(path)
    task = manifest.task
    lines = [
        f"{path}: {manifest.kind} for {task.name}, verified: every file matches its SHA-256",
        f"digest   {manifest.digest}",
        f"parent   {manifest.parent or '-'}",
        f"inputs   {manifest.inputs}",
        f"made     {manifest.created} with " + ", ".join(f"{k} {v}" for k, v in manifest.versions.items()),
        task_of(task).describe(task),
        "files",
        *(
            f"  {record.sha256[:16]}  {human_bytes(record.bytes):>9}  {name}"
            for name, record in sorted(manifest.files.items())
        ),
        "options",
        *(f"  {key} = {value}" for key, value in manifest.options.items() if value not in (None, [])),
    ]
    if manifest.kind == "calibration":
        lines += render_calibration(manifest.metrics)
    if table := manifest.metrics.get("accuracy_table"):
        lines += render(table)
    lines += render_searches(manifest.metrics.get("quantization", {}).get("search", {}))
    for split in ("validation", "test"):
        metrics = manifest.metrics.get(split, {})
        scores = [f"{name} {with_interval(metrics, name)}" for name in TITLES if name in metrics]
        if scores:
            lines.append(f"{split}: {', '.join(scores)}")
    return {**manifest.to_json(), "path": str(path), "verified": True}, "\n".join(lines)
