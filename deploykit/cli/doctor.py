from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deploykit.cli_parts.command import Result, deploykit_command


@deploykit_command(help="Show what this machine has, and what each command still needs on it.")
def command() -> Result:
    from deploykit.doctor import examine
    from deploykit.runtime.engines import ENGINES

    found = examine()
    cpu, gpu, native = found["cpu"], found["gpu"], found["native"]
    lines = [
        f"python    {found['python']['version']} ({found['python']['executable']})",
        f"system    {found['platform']}",
        f"cpu       {cpu['model']}, {cpu['cores']} cores; {' '.join(cpu['features']) or 'no INT8 features known'}",
        f"memory    {found['memory_mb']:,} MB",
        "gpu       " + ("; ".join(f"{d['name']}, driver {d['driver']}" for d in gpu["devices"]) or "none"),
        f"cuda      {gpu['cuda_compiler'] or 'no compiler'}",
        "packages  " + ", ".join(f"{name} {version}" for name, version in found["packages"].items() if version),
        "lacking   " + ", ".join(name for name, version in found["packages"].items() if version is None),
        "engines   " + ", ".join(f"{name} ({info.lacks})" if info.lacks else name for name, info in ENGINES.items()),
        *_native_lines(native),
        "",
    ]
    for name, need in found["commands"].items():
        if need["ready"]:
            lines.append(f"{name:<12} ready")
        else:
            lines += [f"{name:<12} needs {need['missing']}", f"{'':<12} remedy: {need['remedy']}"]
    return found, "\n".join(lines)


def _native_lines(native: Mapping[str, Any]) -> list[str]:
    if native["lacks"]:
        return [f"native    {native['lacks']}", f"{'':<9} remedy: {native['remedy']}"]
    line = f"native    {native['instruction_set']}; this CPU runs {', '.join(native['available'])}"
    return [f"{line} ({native['refused']})" if native["refused"] else line]
