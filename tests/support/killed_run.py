"""A training run that gets a signal between two checkpoints."""

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
            os.kill(os.getpid(), int(sys.argv[2]))

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits that it is ignored

callbacks = trainer.callbacks
trainer.callbacks = lambda *words: [*callbacks(*words), Kill()]
main(sys.argv[3:])
"""


def kill_at_step(step: int, *words: object) -> None:
    """Run the command ``words`` in its own process, which gets SIGKILL when its training has done ``step`` steps."""
    code, told = signal_at_step(signal.SIGKILL, step, *words)
    assert code == -signal.SIGKILL, told


def signal_at_step(number: int, step: int, *words: object) -> tuple[int, str]:
    """The same with another signal. Returns the exit code and all that was printed."""
    command = [sys.executable, "-c", _PROGRAM, str(step), str(number), *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return done.returncode, done.stdout
