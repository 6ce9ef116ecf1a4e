"""Opening the export of a language model."""

from __future__ import annotations

import subprocess
import sys


def test_the_model_process_on_triton_imports_no_ssl() -> None:
    # Triton's Python stub has other symbols than the interpreter that ssl was built for.
    code = "import sys, deploykit.tasks.text_generation.predictor; sys.exit('ssl' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
