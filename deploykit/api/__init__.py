"""The Python API: the stages of the command line as functions, for any task.

Options of a command are keyword arguments of the function with the same name: ``--num-train-epochs 1`` is
``num_train_epochs=1``. Paths are strings or ``Path`` objects. Every error is a ``DeploykitError``; an option in its
message means the argument.
"""

from deploykit.api.model import Model, load
from deploykit.api.server import Server
from deploykit.api.stages import export, finetune, package

__all__ = ["Model", "Server", "export", "finetune", "load", "package"]
