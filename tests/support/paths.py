"""Folders that tests read from."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"
"""Real data for tests; a test that needs a file that is not there is skipped."""
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "deploykit"
"""What tests keep for the next run: downloads, and what takes long to compile."""
