"""Check whether an answer is valid in a language, without running it."""

from __future__ import annotations

import ast
import importlib
import json
import shutil
import subprocess
import warnings
from typing import Any, Literal, cast, get_args

from deploykit.errors import MissingDependencyError, UsageError

Syntax = Literal["bash", "python", "json", "sql"]
SYNTAXES: tuple[str, ...] = get_args(Syntax)
_PARSE_TIMEOUT_S = 10


def check_syntax(name: str) -> Syntax:
    """Return ``name`` as a syntax. Raises UsageError for another, MissingDependencyError where its parser is missing."""
    if name not in SYNTAXES:
        raise UsageError(f"--syntax is {name!r}", f"give {', '.join(SYNTAXES)}")
    if name == "bash":
        _bash()
    elif name == "sql":
        _sqlglot()
    return cast(Syntax, name)


def parses(text: str, syntax: Syntax) -> bool:
    """Return whether ``text`` is valid: bash reads it with -n, sqlglot parses SQL of no particular dialect."""
    if not text.strip():
        return False
    try:
        if syntax == "json":
            json.loads(text)
        elif syntax == "python":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of odd escapes
                ast.parse(text)
        elif syntax == "sql":
            return _is_sql(text)
        else:
            command = [_bash(), "--noprofile", "--norc", "-n"]
            done = subprocess.run(
                command, input=text.encode(), capture_output=True, timeout=_PARSE_TIMEOUT_S, check=False
            )
            return done.returncode == 0
    except (ValueError, SyntaxError, RecursionError, MemoryError, subprocess.TimeoutExpired):
        return False
    return True


def _bash() -> str:
    shell = shutil.which("bash")
    if shell is None:
        raise MissingDependencyError("--syntax bash needs bash", "install bash")
    return shell


def _sqlglot() -> Any:
    try:
        return importlib.import_module("sqlglot")
    except ImportError as error:
        raise MissingDependencyError(
            "--syntax sql needs sqlglot, which is not installed", "pip install 'deploykit[sql]'"
        ) from error


def _is_sql(text: str) -> bool:
    """Return whether every statement is one that sqlglot knows: it also reads bare expressions, as in "hello world"."""
    sqlglot = _sqlglot()
    known = (sqlglot.exp.Query, sqlglot.exp.DML, sqlglot.exp.DDL, sqlglot.exp.Drop, sqlglot.exp.Alter)
    try:
        statements = [found for found in sqlglot.parse(text) if found is not None]
    except sqlglot.errors.SqlglotError:
        return False
    return bool(statements) and all(isinstance(statement, known) for statement in statements)
