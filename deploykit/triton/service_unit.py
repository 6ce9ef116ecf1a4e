"""Write a systemd unit that keeps ``deploykit serve`` running."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

_UNIT = """\
[Unit]
Description=deploykit serve
After=network.target
# Restart the server, however often it ends.
StartLimitIntervalSec=0

[Service]
Type=exec
WorkingDirectory={folder}
ExecStart={command}
Restart=always
RestartSec=0.2
# SIGTERM lets requests finish. Processes that remain when the main process ends are killed, which frees the ports.
KillMode=mixed
TimeoutStopSec={stop:g}
# If the kernel kills a model process because memory is short, the service continues and loads the model again.
OOMPolicy=continue
NoNewPrivileges=true
ProtectSystem=full

[Install]
WantedBy=multi-user.target
"""


def service_unit(words: Sequence[str], folder: Path, drain: float) -> str:
    """Return the unit for ``deploykit serve`` with the arguments ``words``, run in ``folder``."""
    command = [sys.executable, "-m", "deploykit", "serve", *words]
    return _UNIT.format(folder=_escaped(str(folder)), command=" ".join(map(_quoted, command)), stop=drain + 15)


def _escaped(text: str) -> str:
    return text.replace("%", "%%")


def _quoted(word: str) -> str:
    """Return ``word`` so that systemd takes it as one, and as it is."""
    escaped = _escaped(word).replace("\\", "\\\\").replace('"', '\\"').replace("$", "$$")
    return f'"{escaped}"' if not escaped or set(escaped) & set(" \t'\";") else escaped
