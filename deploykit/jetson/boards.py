"""The boards that bundles are made for, and the JetPack releases that they run.

Sources: NVIDIA's JetPack archive (Jetson Linux, TensorRT and Python of each release; Orin is not supported by 7.0
and 7.1); "Strongly Typed Networks" needs TensorRT 10, so that JetPack 5 and 6.0 are out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from deploykit.errors import UsageError


@dataclass(frozen=True)
class Board:
    """``model`` is a part of what its device tree calls it. The caps are chosen for the smallest memory that it is sold
    with: ``workspace_mib`` bounds what building an engine may take, ``max_batch`` the rows of one run, and
    ``max_positions`` the tokens of a translator's texts and translations: it has caches for the most of both."""

    model: str
    workspace_mib: int
    max_batch: int
    max_positions: int


@dataclass(frozen=True)
class JetPack:
    """``l4t`` is its Jetson Linux (as far as it is known), ``tensorrt`` and ``python`` the versions it comes with;
    ``glibc`` is the minor version."""

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
    """The key in ``BOARDS`` of what was typed, with or without ``jetson-``. Raises UsageError."""
    name = target.lower().removeprefix("jetson-")
    if name not in BOARDS:
        raise UsageError(f"unknown --device {target!r}", f"choose one of: {', '.join(BOARDS)}")
    return name


def find_jetpack(version: str, target: str) -> JetPack:
    """Raises UsageError for a release that is not known, has no fitting TensorRT, or does not run on ``target``."""
    if version not in JETPACKS:
        known = f"choose one of: {', '.join(JETPACKS)}"
        if version.startswith("5.") or version == "6.0":
            raise UsageError(f"--jetpack {version}: its TensorRT is older than 10.3, which engines need", known)
        raise UsageError(f"unknown --jetpack {version!r}", known)
    if target == "thor" and version.startswith("6."):
        raise UsageError(f"--jetpack {version} does not run on Jetson Thor", "give --jetpack 7.0 or newer")
    if target != "thor" and version in _THOR_ALONE:
        raise UsageError(f"--jetpack {version} runs on Jetson Thor alone", "give --jetpack 6.2, or 7.2 or newer")
    return JETPACKS[version]
