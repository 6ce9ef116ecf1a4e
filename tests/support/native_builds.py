"""The engine ``native`` compiled for other machines, and what their linkers wrote."""

from __future__ import annotations

import os
import runpy
import struct
import subprocess
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from paths import CACHE, ROOT

BUILD = runpy.run_path(str(ROOT / "setup.py"))
KERNELS = ROOT / "tests/integration/native_kernels.c"


UNOPTIMIZED = ("-O0", "-fno-sanitize=undefined")
ALWAYS_OPTIMIZED = ("avx2", "avxvnni")
"""Their assembler needs constants that only an optimizer finds."""


def compile_engine(
    folder: Path,
    target: str,
    *programs: Path,
    optimize: bool = True,
    cpus: Mapping[str, str] = {},
    flags: Mapping[str, tuple[str, ...]] = {},
) -> list[str]:
    """Compile the engine's files and ``programs`` for a target of setup.py's, as it does. Zig keeps what it compiled in this
    tree: the first time takes a minute of a CPU, or a fifth of it with ``optimize=False``, later ones a second.

    A program takes the place of the engine's file of its name. ``cpus`` and ``flags``: others for the files of these names,
    without .c.
    """
    architecture, zig = BUILD["TARGETS"][target][:2]
    own = {program.stem for program in programs}
    sources = {s: cpu for s, cpu in BUILD["native_sources"](architecture).items() if Path(s).stem not in own}
    sources |= dict.fromkeys(map(str, programs))

    def compiled(source: str) -> str:
        name = Path(source).stem
        out = str(folder / f"{name}.o")
        cpu = cpus.get(name) or sources[source] or BUILD["CPUS"][architecture]["scalar"]
        more = (*(() if optimize or name in ALWAYS_OPTIMIZED else UNOPTIMIZED), *flags.get(name, ()))
        subprocess.run((*BUILD["compiler"](zig, cpu), *more, "-c", source, "-o", out), cwd=ROOT, check=True)
        return out

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compiled, sources))


def link(target: str, out: Path, *arguments: str) -> None:
    architecture, zig = BUILD["TARGETS"][target][:2]
    command = BUILD["compiler"](zig, BUILD["CPUS"][architecture]["scalar"])
    environment = {**os.environ, "ZIG_LIB_DIR": str(_zig_library())}
    subprocess.run((*command, *arguments, "-o", str(out), "-lm", "-lpthread"), check=True, env=environment)


def _zig_library() -> Path:
    """Return a path to Zig's library that is the same in every checkout. Zig compiles the C library of Windows from there, in
    100 seconds of a CPU, and keeps it for that path."""
    import ziglang

    kept = CACHE / f"zig-{version('ziglang')}"
    library = Path(ziglang.__file__).parent / "lib"
    if not kept.is_symlink() or kept.resolve() != library.resolve():
        kept.parent.mkdir(parents=True, exist_ok=True)
        new = kept.with_suffix(f".{os.getpid()}")
        new.symlink_to(library)
        new.replace(kept)
    return kept


@dataclass(frozen=True)
class Library:
    """``system`` is the oldest version of macOS, else ""."""

    kind: str
    exports: frozenset[str]
    needs: frozenset[str]
    system: str = ""


def read_mach_o(data: bytes) -> Library:
    """Source: Apple, mach-o/loader.h and nlist.h."""
    kind = {0x0100000C: "arm64", 0x01000007: "x86_64"}[_unpack("<I", data, 4)[0]]
    exports, needs, version = set[str](), set[str](), 0
    at = 32
    for _ in range(_unpack("<I", data, 16)[0]):
        command, size = _unpack("<II", data, at)
        if command == 2:  # LC_SYMTAB
            symbols, count, names = _unpack("<III", data, at + 8)
            for i in range(count):
                name, type_ = _unpack("<IB", data, symbols + 16 * i)
                # External, in a section; the linker adds names of two underscores.
                if type_ & 0x0F == 0x0F and not (text := _text(data, names + name)).startswith("__"):
                    exports.add(text.removeprefix("_"))
        elif command == 12:  # LC_LOAD_DYLIB
            needs.add(_text(data, at + _unpack("<I", data, at + 8)[0]))
        elif command in (0x24, 0x32):  # LC_VERSION_MIN_MACOSX, LC_BUILD_VERSION
            version = _unpack("<I", data, at + (8 if command == 0x24 else 12))[0]
        at += size
    return Library(kind, frozenset(exports), frozenset(needs), f"{version >> 16}.{version >> 8 & 255}")


def read_dll(data: bytes) -> Library:
    """Source: Microsoft, "PE Format"."""
    head = _unpack("<I", data, 0x3C)[0] + 4
    kind, sections = _unpack("<HH", data, head)
    optional = head + 20
    table = optional + _unpack("<H", data, head + 16)[0]
    places = [_unpack("<IIII", data, table + 40 * i + 8) for i in range(sections)]

    def at(address: int) -> int:
        return next(address - begin + offset for _, begin, size, offset in places if begin <= address < begin + size)

    def names() -> Iterator[str]:
        exports = at(_unpack("<I", data, optional + 112)[0])
        count, pointers = _unpack("<I", data, exports + 24)[0], at(_unpack("<I", data, exports + 32)[0])
        for i in range(count):
            yield _text(data, at(_unpack("<I", data, pointers + 4 * i)[0]))

    needs, entry = set[str](), at(_unpack("<I", data, optional + 120)[0])
    while name := _unpack("<I", data, entry + 12)[0]:
        needs.add(_text(data, at(name)))
        entry += 20
    return Library({0x8664: "x86_64"}[kind], frozenset(names()), frozenset(needs))


def _unpack(form: str, data: bytes, at: int) -> tuple[int, ...]:
    return struct.unpack_from(form, data, at)


def _text(data: bytes, at: int) -> str:
    return data[at : data.index(0, at)].decode()
