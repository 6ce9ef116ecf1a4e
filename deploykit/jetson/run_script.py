"""Write run.sh of a bundle, which verifies every file's checksum before it runs anything."""

from __future__ import annotations

from collections.abc import Sequence

_RUN_SH = """\
#!/bin/sh
# Builds, verifies and serves the model of this bundle on the device. See: ./run.sh --help
set -eu
cd "$(dirname "$0")"

fail() { # MESSAGE REMEDY
  echo "error: $1" >&2
  echo "remedy: $2" >&2
  exit 1
}

sha256sum --check --quiet --strict SHA256SUMS ||
  fail "a file of this bundle is missing or was changed" "get it again, and unpack it in an empty folder"

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
  fail "$python is not Python 3.10 or newer" "name one: PYTHON=/path/to/python3 ./run.sh"

# A wheel is a zip file for Python's path, so the device needs neither pip nor a network.
if [ -d wheels ] && [ ! -d site ]; then
  rm -rf site.partial
  for wheel in wheels/*.whl; do
    "$python" -m zipfile -e "$wheel" site.partial
  done
  mv site.partial site
fi
export PYTHONPATH="$PWD/lib:$PWD/site" PYTHONDONTWRITEBYTECODE=1
"$python" -c 'import MODULES' ||
  fail "MODULES: cannot be imported by $python, $("$python" --version)" \\
    "with a network: $python -m pip install --no-deps --target site -r wheels.txt; or bundle again with --wheels"

exec "$python" -m deploykit.jetson.device "$@"
"""


def run_sh(modules: Sequence[str]) -> str:
    """Return the script for a model that imports ``modules`` in addition to numpy and an engine."""
    return _RUN_SH.replace("MODULES", ", ".join(("numpy", *modules)))
