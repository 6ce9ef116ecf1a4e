"""Describe the machine of a measurement: hardware, other load, and the server's processes."""

from __future__ import annotations

import os
import platform
import socket
import time
from dataclasses import asdict, dataclass
from typing import Any

from deploykit.artifacts import installed_versions
from deploykit.hardware import available_cpus, cpu_name, first_cpu
from deploykit.peak_memory import require_psutil
from deploykit.runtime.engines.native import loader as native

_FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimddp", "i8mm", "sve")
_WATCH_S = 0.3


@dataclass(frozen=True)
class OtherLoad:
    """Load of other programs just before a round: percent of all CPUs together, and the load average over one minute
    (which still includes this program's earlier work).
    """

    cpu_percent: float
    load_average: float

    def to_json(self) -> dict[str, float]:
        return asdict(self)


def other_load() -> OtherLoad:
    """Measure the CPUs for 0.3 s in which this process is idle, except for its engines' threads."""
    own = time.process_time()
    percent = float(require_psutil().cpu_percent(interval=_WATCH_S))
    own_percent = 100 * (time.process_time() - own) / _WATCH_S / (os.cpu_count() or 1)
    return OtherLoad(round(max(0.0, percent - own_percent), 1), os.getloadavg()[0])


def describe_machine() -> dict[str, Any]:
    """Return CPU, instruction set of the engine ``native``, memory (1e9 bytes), operating system, Python and package versions."""
    cpu = first_cpu()
    flags = set((cpu.get("flags") or cpu.get("Features") or "").split())
    return {
        "cpu": cpu_name(),
        "cpus_usable": available_cpus(),
        "cpus": os.cpu_count(),
        "cpu_flags": [flag for flag in _FLAGS if flag in flags],
        "native_isa": None if native.lacks() else native.instruction_set(),
        "memory_gb": round(require_psutil().virtual_memory().total / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": installed_versions(),
    }


def server_processes(url: str) -> list[Any]:
    """Return the processes (psutil) of the server that listens at ``url`` on this machine, with its descendants.

    Empty for a server elsewhere, or one that this user may not inspect.
    """
    from deploykit.runtime.served import parse_url

    psutil = require_psutil()
    host, _, port = parse_url(url)[0].partition("/")[0].rpartition(":")
    if not _is_local(host.strip("[]")):
        return []
    try:
        listening = {
            c.pid
            for c in psutil.net_connections("tcp")
            if c.status == psutil.CONN_LISTEN and c.laddr.port == int(port) and c.pid
        }
        owners = [psutil.Process(pid) for pid in listening]
        return list({p.pid: p for owner in owners for p in (owner, *owner.children(recursive=True))}.values())
    except psutil.Error:
        return []


def _is_local(host: str) -> bool:
    try:
        addresses = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    own = {a.address for interface in require_psutil().net_if_addrs().values() for a in interface}
    return bool(addresses & own) or all(str(a).startswith("127.") for a in addresses)


def settle() -> None:
    """Wait for the machine to calm down after loading or measuring."""
    time.sleep(0.1)
