"""Write the README's table from the newest result under bench/results/."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
START, END = "<!-- measured:start -->\n", "<!-- measured:end -->"


def render(result: dict[str, Any]) -> str:
    """Markdown: a line per candidate; throughputs as ratios to ONNX Runtime fp32 in the same run, with their spread."""
    machine, candidates = result["machine"], result["candidates"]
    base = next(c for c in candidates if (c["engine"], c["precision"]) == ("onnxruntime", "fp32"))
    callers = [s["scenario"]["name"] for s in base["scenarios"] if s["scenario"]["kind"] == "closed_loop"]
    lines = [
        f"The demo's model on its {result['texts']['rows']:,} test tweets, {result['started'][:10]}, {machine['cpu']}, "
        f"{machine['cpus_usable']} cores. Sentences/s are multiples of ONNX Runtime fp32's in the same run "
        f"(median of {result['settings']['rounds']} rounds; lowest to highest round). p50: one caller.",
        "",
        "| | macro-F1 | p50 ms | " + " | ".join(f"{name}" for name in callers) + " | size MB | memory MB |",
        "|---|---:|---:|" + "---:|" * len(callers) + "---:|---:|",
    ]
    for c in candidates:
        cells = [c["name"], f"{c['metrics']['macro_f1']:.4f}"]
        single = next(s for s in c["scenarios"] if s["scenario"].get("concurrency") == 1)
        cells.append(f"{single['latency_ms']['p50']['median']:.2f}")
        for name in callers:
            ours, theirs = (next(s for s in x["scenarios"] if s["scenario"]["name"] == name) for x in (c, base))
            reference = theirs["throughput_per_s"]["median"]
            middle, low, high = (ours["throughput_per_s"][key] / reference for key in ("median", "min", "max"))
            cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
        cells += ["-" if c[key] is None else f"{c[key]:.0f}" for key in ("size_mb", "peak_memory_mb")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def with_table(readme: str, result: dict[str, Any]) -> str:
    """``readme`` with the table between its marks replaced."""
    before, rest = readme.split(START)
    return before + START + render(result) + END + rest.split(END, 1)[1]


def newest() -> dict[str, Any]:
    path = max((ROOT / "bench" / "results").glob("*-sentiment.json"))
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(with_table(readme.read_text(encoding="utf-8"), newest()), encoding="utf-8")
