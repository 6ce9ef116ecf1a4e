"""Write protobuf text format."""

from __future__ import annotations

import json
from typing import Any


def quoted(value: Any) -> str:
    """Return JSON as the inside of a single-quoted protobuf text string."""
    return json.dumps(value, ensure_ascii=False).replace("\\", "\\\\").replace("'", "\\'")
