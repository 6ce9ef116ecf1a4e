"""Send each model of a repository folder one request; exit with 0 if all answered. For a container's health check.

Usage: health.py FOLDER [URL]. It uses only the standard library.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any


def check(folder: Path, url: str) -> list[str]:
    """Return a line for each model that did not answer. Streaming models are skipped: they only forward requests."""
    problems = []
    for model in sorted(path.parent.name for path in folder.glob("*/config.pbtxt")):
        try:
            config = _call(f"{url}/v2/models/{model}/config")
            names = [tensor["name"] for tensor in config["input"]]
            if "text_input" in names:  # a language model
                body = {"text_input": "a", "sampling_parameters": '{"max_new_tokens": 1}'}
                _call(f"{url}/v2/models/{model}/generate", json.dumps(body).encode())
            elif not config.get("model_transaction_policy", {}).get("decoupled"):
                inputs = [
                    {"name": t["name"], "datatype": "BYTES", "shape": [1, 1], "data": ["a"]} for t in config["input"]
                ]
                _call(f"{url}/v2/models/{model}/infer", json.dumps({"inputs": inputs}).encode())
        except (OSError, ValueError) as error:
            problems.append(f"{model}: {error}")
    return problems


def _call(url: str, body: bytes | None = None) -> Any:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(url, body, timeout=10) as answer:
        return json.load(answer)


if __name__ == "__main__":
    found = check(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "http://127.0.0.1:8000")
    sys.exit("\n".join(found) or None)
