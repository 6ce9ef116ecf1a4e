"""The library that refuses hostile requests inside Triton; see guard.c."""

from __future__ import annotations

from pathlib import Path

LIBRARY = Path(__file__).with_name("_guard.abi3.so")
