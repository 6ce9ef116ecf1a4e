"""Count the instructions that the engine ``native`` and a plain loop take on Arm for a row of a matrix.

qemu emulates the CPUs and records each instruction; the count of a product is the difference between two runs. Speed on
real CPUs is not measured. Needs the packages that test_native_on_arm.py needs. Writes bench/results/<date>-arm-instructions.json.
"""

from __future__ import annotations

import datetime
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from suite import begin, say, write_record

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests/support"))

from native_builds import BUILD, compile_engine  # noqa: E402

CPUS = {"cortex-a72": "neon", "neoverse-n1": "dotprod", "max": "i8mm"}
LAYERS = {"layer": "a classifier's or translator's layer", "matrix": "a language model's matrix"}
ROWS = (1, 6)
LOOPS = {"plain": (), "plain, not vectorized": ("-fno-vectorize", "-fno-slp-vectorize")}
PROGRAM = ROOT / "bench/arm_products.c"


def main() -> None:
    suite = begin("arm_instructions.py", 1, {}, ())
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        objects = compile_engine(folder, "linux-aarch64")
        for cpu, isa in CPUS.items():
            programs = {loop: _program(folder, objects, isa, flags) for loop, flags in LOOPS.items()}
            for layer, title in LAYERS.items():
                for rows in ROWS:
                    found = {
                        loop: _count(folder, program, cpu, isa, "plain", layer, rows)
                        for loop, program in programs.items()
                    }
                    ours = _count(folder, programs["plain"], cpu, isa, "engine", layer, rows)
                    ratios = {loop: round(count / ours, 2) for loop, count in found.items()}
                    suite["workloads"].append(
                        {"isa": isa, "layer": title, "rows": rows, "native": ours, **found, "ratios": ratios}
                    )
                    say(f"{isa}, {title}, {rows} rows: {ours} instructions; {found}: x {ratios}")
    write_record(suite, ROOT / f"bench/results/{datetime.date.today()}-arm-instructions.json")


def _program(folder: Path, objects: list[str], isa: str, flags: tuple[str, ...]) -> Path:
    """Compile the program for the CPU, so that the plain loop may use its instructions too."""
    csrc = ROOT / BUILD["CSRC"]
    out = folder / f"{isa}-{len(flags)}"
    compiler = BUILD["compiler"](BUILD["TARGETS"]["linux-aarch64"].zig, BUILD["CPUS"]["aarch64"][isa])
    subprocess.run((*compiler, *flags, f"-I{csrc}", "-c", str(PROGRAM), "-o", f"{out}.o"), check=True)
    subprocess.run(
        ("aarch64-linux-gnu-gcc", "-static", f"{out}.o", *objects, "-o", str(out), "-lm", "-lpthread"), check=True
    )
    return out


def _count(folder: Path, program: Path, cpu: str, isa: str, which: str, layer: str, rows: int) -> int:
    once, twice = (_lines(folder, program, cpu, isa, (which, layer, str(rows), str(n))) for n in (1, 2))
    return twice - once


def _lines(folder: Path, program: Path, cpu: str, isa: str, words: tuple[str, ...]) -> int:
    log = folder / "log"
    qemu = shutil.which("qemu-aarch64-static") or "qemu-aarch64"
    command = (qemu, "-cpu", cpu, "-singlestep", "-d", "nochain,exec", "-D", str(log), str(program), *words)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    if done.stdout.strip() != isa:
        raise SystemExit(f"{cpu} runs {done.stdout.strip()}, not {isa}")
    with log.open("rb") as file:
        return sum(line.startswith(b"Trace") for line in file)


if __name__ == "__main__":
    main()
