"""All exceptions of deploykit form one tree, drawn in errors.py."""

from __future__ import annotations

import ast
import builtins
import re
from pathlib import Path

import deploykit
from deploykit import errors

ROOT = Path(deploykit.__file__).parent


def _classes() -> dict[str, list[str]]:
    """Return every class of the package with the names of its bases, parsed without importing the modules."""
    found = {}
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                found[node.name] = [ast.unparse(base).rsplit(".", 1)[-1] for base in node.bases]
    return found


def test_every_exception_descends_from_the_one_base() -> None:
    classes = _classes()
    exceptions = {
        name for name, value in vars(builtins).items() if isinstance(value, type) and issubclass(value, BaseException)
    }
    roots = {name for name, bases in classes.items() if exceptions.intersection(bases)}
    assert roots == {"DeploykitError", "Interrupted"}, "Ctrl-C is no error"
    for name in ("RefusedError", "CancelledError", "FailedError", "QueueFullError", "TritonModelException"):
        assert _ancestors(name, classes)[-1] == "DeploykitError"


def _ancestors(name: str, classes: dict[str, list[str]]) -> list[str]:
    chain = [name]
    while chain[-1] != "DeploykitError":
        chain.append(next(base for base in classes[chain[-1]] if base in classes))
    return chain


def test_the_drawn_tree_is_the_real_one() -> None:
    drawn = re.findall(r"(?:├── |└── |^    )(\w+Error)\b", errors.__doc__ or "", re.MULTILINE)
    public = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert set(drawn) == public | {"RefusedError"}
    assert len(drawn) == len(set(drawn))
