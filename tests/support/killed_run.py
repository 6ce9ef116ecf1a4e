"""A training run that is killed between two checkpoints."""

from __future__ import annotations

import signal
import subprocess
import sys

_PROGRAM = """
import os, signal, sys
from transformers import TrainerCallback
from deploykit.cli import main
from deploykit.training import trainer

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)

callbacks = trainer.callbacks
trainer.callbacks = lambda *words: [*callbacks(*words), Kill()]
main(sys.argv[2:])
"""


def kill_at_step(step: int, *words: object) -> None:
    """Run the command ``words`` in its own process, which gets SIGKILL when its training has done ``step`` steps."""
    command = [sys.executable, "-c", _PROGRAM, str(step), *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stdout
