from __future__ import annotations

from pathlib import Path

import click

from deploykit.artifacts import load_manifest
from deploykit.cli.common import Result, deploykit_command, human_bytes


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
        f"labels   {', '.join(task.labels)}{' (multi-label)' if task.multi_label else ''}; at most {task.max_length} tokens",
        "files",
        *(
            f"  {record.sha256[:16]}  {human_bytes(record.bytes):>9}  {name}"
            for name, record in sorted(manifest.files.items())
        ),
        "options",
        *(f"  {key} = {value}" for key, value in manifest.options.items()),
    ]
    for line in manifest.metrics.get("accuracy_table", []):
        lines.append(
            f"{line['precision']} {line['engine']}: accuracy {line['accuracy']:.4f}, macro-F1 {line['macro_f1']:.4f}"
        )
    for split in ("validation", "test"):
        if "macro_f1" in manifest.metrics.get(split, {}):
            metrics = manifest.metrics[split]
            lines.append(f"{split}: accuracy {metrics['accuracy']:.4f}, macro-F1 {metrics['macro_f1']:.4f}")
    return {**manifest.to_json(), "path": str(path), "verified": True}, "\n".join(lines)
