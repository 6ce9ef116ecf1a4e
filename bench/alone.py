"""Run one contender in a separate process, without the libraries that only other contenders need."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType


def main() -> None:
    """Read the contenders' module and the packages to hide from ``sys.argv``, and the job from stdin."""
    module, *hidden = sys.argv[1:]
    for package in hidden:
        sys.modules[package] = ModuleType(package)  # shared code may import it
    contenders = importlib.import_module(module)

    from deploykit.bench.separate_process import answer_alone

    for package in hidden:
        # torch is needed only for conversions, which are done; checks of whether a package is installed must still find
        # it.
        if package == "torch":
            sys.modules[package] = None  # type: ignore[assignment]
        else:
            del sys.modules[package]
    answer_alone(contenders.open_job)


if __name__ == "__main__":
    main()
