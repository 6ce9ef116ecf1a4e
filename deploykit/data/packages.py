"""Import the packages that only some data files need."""

from __future__ import annotations

import importlib
from typing import Any

from deploykit.errors import MissingDependencyError


def import_data_package(name: str) -> Any:
    """Import a package of the ``finetune`` or ``xlsx`` extra. Raises MissingDependencyError naming it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependencyError(
            f"this source needs the package {name!r}, which is not installed",
            f"pip install 'deploykit[{'xlsx' if name == 'openpyxl' else 'finetune'}]'",
        ) from error
