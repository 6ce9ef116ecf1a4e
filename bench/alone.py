"""One contender in a process of its own, without the libraries that only its neighbours in the bench need."""

from __future__ import annotations

import sys
from types import ModuleType


def main() -> None:
    """``sys.argv`` names the engine; the rest of the job comes on stdin."""
    engine = sys.argv[1]
    if engine != "deploykit":
        sys.modules["onnxruntime"] = ModuleType("onnxruntime")  # the code that all share imports it

    from contenders import open_job

    from deploykit.bench.alone import answer_alone

    if engine != "deploykit":
        del sys.modules["onnxruntime"]  # whoever asks whether it is installed shall find it
    if engine == "CTranslate2":
        sys.modules["torch"] = None  # type: ignore[assignment]  # it would import it to convert, which is done
    answer_alone(open_job)


if __name__ == "__main__":
    main()
