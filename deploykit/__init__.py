"""Fine-tune Hugging Face models, export them to ONNX and INT8, and serve them on Triton.

    checkpoint = deploykit.finetune("org/model", train="rows.csv", output_dir="runs/a")
    exported = deploykit.export(checkpoint.path, "exports/a", int8=True)
    deploykit.package(exported.path, "reviews")
    with deploykit.Server() as server:
        answers = server.load("reviews").predict(["What a film!"])

All names here are public, and imported at their first use.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from deploykit.api import Model as Model
    from deploykit.api import Server as Server
    from deploykit.api import export as export
    from deploykit.api import finetune as finetune
    from deploykit.api import load as load
    from deploykit.api import package as package
    from deploykit.attribution.explain import Explanation as Explanation
    from deploykit.errors import ArtifactError as ArtifactError
    from deploykit.errors import CorruptArtifactError as CorruptArtifactError
    from deploykit.errors import DataError as DataError
    from deploykit.errors import DeploykitError as DeploykitError
    from deploykit.errors import EngineError as EngineError
    from deploykit.errors import ExportError as ExportError
    from deploykit.errors import MissingDependencyError as MissingDependencyError
    from deploykit.errors import RequestError as RequestError
    from deploykit.errors import ServerError as ServerError
    from deploykit.errors import UsageError as UsageError
    from deploykit.stages.export import Exported as Exported
    from deploykit.stages.finetune import Finetuned as Finetuned
    from deploykit.tasks.types import Answer as Answer
    from deploykit.tasks.types import Evaluation as Evaluation
    from deploykit.tensorrt.options import EngineOptions as EngineOptions
    from deploykit.triton.repository import Packaged as Packaged

_MODULES: Mapping[str, str] = {
    **dict.fromkeys(("Model", "Server", "export", "finetune", "load", "package"), "deploykit.api"),
    **dict.fromkeys(
        (
            "ArtifactError",
            "CorruptArtifactError",
            "DataError",
            "DeploykitError",
            "EngineError",
            "ExportError",
            "MissingDependencyError",
            "RequestError",
            "ServerError",
            "UsageError",
        ),
        "deploykit.errors",
    ),
    "Answer": "deploykit.tasks.types",
    "EngineOptions": "deploykit.tensorrt.build",
    "Evaluation": "deploykit.tasks.types",
    "Explanation": "deploykit.attribution.explain",
    "Exported": "deploykit.stages.export",
    "Finetuned": "deploykit.stages.finetune",
    "Packaged": "deploykit.triton.repository",
}
__all__ = [
    "Answer",
    "ArtifactError",
    "CorruptArtifactError",
    "DataError",
    "DeploykitError",
    "EngineError",
    "EngineOptions",
    "Evaluation",
    "Explanation",
    "ExportError",
    "Exported",
    "Finetuned",
    "MissingDependencyError",
    "Model",
    "Packaged",
    "RequestError",
    "Server",
    "ServerError",
    "UsageError",
    "__version__",
    "export",
    "finetune",
    "load",
    "package",
]


def __getattr__(name: str) -> Any:
    """Import a public name at its first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
