"""Run deploykit and write its peak memory, in bytes: ``python bench/gpu/peak.py FILE COMMAND …``.

It is PyTorch's on the GPU, where PyTorch used one, or else the process's.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

from deploykit.cli import main

if __name__ == "__main__":
    try:
        main(sys.argv[2:])
    finally:
        torch = sys.modules.get("torch")
        on_gpu = torch.cuda.max_memory_allocated() if torch is not None and torch.cuda.is_available() else 0
        Path(sys.argv[1]).write_text(str(on_gpu or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10))
