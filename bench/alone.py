"""Run one contender in a separate process, without the libraries that only other contenders need."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType


def main() -> None:
    """Read the contenders' module and the packages to hide from ``sys.argv``, and the job from stdin."""
    module, *hidden = sys.argv[1:]
    for package in hidden:
        sys.modules[package] = ModuleType(package)  # the code that all share may import it
    contenders = importlib.import_module(module)

    from deploykit.bench.alone import answer_alone

    for package in hidden:
        # torch is imported for conversions alone, which are done; whoever asks whether another is installed shall find it.
        if package == "torch":
            sys.modules[package] = None  # type: ignore[assignment]
        else:
            del sys.modules[package]
    answer_alone(contenders.open_job)


if __name__ == "__main__":
    main()
