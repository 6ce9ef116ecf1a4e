"""The boards that bundles support, and the JetPack releases that run on them.

Sources: NVIDIA's JetPack archive (Jetson Linux, TensorRT and Python of each release; 7.0 and 7.1 do not support Orin);
"Strongly Typed Networks" needs TensorRT 10, which excludes JetPack 5 and 6.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from deploykit.errors import UsageError


@dataclass(frozen=True)
class Board:
    """A board. ``model`` is a part of the name in its device tree.

    The limits fit the smallest memory that the board is sold with: ``workspace_mib`` for building an engine,
    ``max_batch`` for the rows of one run, ``max_positions`` for the tokens of a translator's texts and translations,
    which have caches of that size.
    """

    model: str
    workspace_mib: int
    max_batch: int
    max_positions: int


@dataclass(frozen=True)
class JetPack:
    """A release. ``l4t`` is its Jetson Linux (as far as known); ``tensorrt``, ``python`` and ``glibc`` (minor) its
    versions.
    """

    version: str
    l4t: str
    tensorrt: str
    python: str
    glibc: int


BOARDS: Mapping[str, Board] = {
    "orin-nano": Board("Orin Nano", 512, 16, 256),
    "orin-nx": Board("Orin NX", 512, 16, 256),
    "agx-orin": Board("AGX Orin", 2048, 32, 512),
    "thor": Board("Thor", 4096, 64, 1024),
}
JETPACKS: Mapping[str, JetPack] = {
    release.version: release
    for release in (
        JetPack("6.1", "36.4", "10.3", "3.10", 35),
        JetPack("6.2", "36.4.3", "10.3", "3.10", 35),
        JetPack("6.2.1", "36.4.4", "10.3", "3.10", 35),
        JetPack("7.0", "38.2", "10.13", "3.12", 39),
        JetPack("7.1", "38.4", "10.13", "3.12", 39),
        JetPack("7.2", "39.2", "10.16", "3.12", 39),
        JetPack("7.2.2", "39", "11.4", "3.12", 39),
    )
}
_THOR_ALONE = ("7.0", "7.1")


def find_board(target: str) -> str:
    """Return the key in ``BOARDS`` for a name with or without ``jetson-``. Raises UsageError."""
    name = target.lower().removeprefix("jetson-")
    if name not in BOARDS:
        raise UsageError(f"unknown --device {target!r}", f"choose one of: {', '.join(BOARDS)}")
    return name


def find_jetpack(version: str, target: str) -> JetPack:
    """Return a JetPack release. Raises UsageError if it is unknown, its TensorRT is too old, or ``target`` cannot run
    it.
    """
    if version not in JETPACKS:
        known = f"choose one of: {', '.join(JETPACKS)}"
        if version.startswith("5.") or version == "6.0":
            raise UsageError(f"--jetpack {version}: its TensorRT is older than 10.3, the oldest supported", known)
        raise UsageError(f"unknown --jetpack {version!r}", known)
    if target == "thor" and version.startswith("6."):
        raise UsageError(f"--jetpack {version} does not run on Jetson Thor", "give --jetpack 7.0 or newer")
    if target != "thor" and version in _THOR_ALONE:
        raise UsageError(f"--jetpack {version} runs on Jetson Thor only", "give --jetpack 6.2, or 7.2 or newer")
    return JETPACKS[version]
