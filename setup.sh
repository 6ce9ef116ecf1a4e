#!/usr/bin/env bash
# Creates the virtual environment $1 with deploykit and all its extras; with --browser, installs a browser for the tests,
# and with --emulator, an emulator of Arm CPUs and a linker for them.
# Run by `make`. As root, it installs missing system packages; otherwise it prints the command that does.
set -euo pipefail
venv=${1:?usage: setup.sh VENV | --browser | --emulator}

system_package() { # NAMES WHY
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing the system package $1 ($2)"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $1; } >/dev/null && return
  fi
  echo "error: the system package $1 is missing ($2)" >&2
  echo "remedy: sudo apt-get install $1" >&2
  exit 1
}

if [ "$venv" = --browser ]; then
  [ -n "$(type -P chromium-headless-shell chromium chrome-headless-shell google-chrome chromium-browser)" ] ||
    (system_package chromium-headless-shell "a test opens the reports in it") || echo "continuing without it: that test is skipped" >&2
  exit
fi

if [ "$venv" = --emulator ]; then
  if [ -z "$(type -P qemu-aarch64-static qemu-aarch64)" ] || [ -z "$(type -P aarch64-linux-gnu-gcc)" ]; then
    (system_package "qemu-user-static gcc-aarch64-linux-gnu libc6-dev-arm64-cross" "tests run the kernels for Arm in it") ||
      echo "continuing without it: those tests are skipped" >&2
  fi
  exit
fi

# The embedded Triton's stub needs numpy 1, which needs a Python below 3.13.
python=
for candidate in ${PYTHON:-python3 python3.12 python3.11 python3.10}; do
  if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' 2>/dev/null; then
    python=$candidate
    break
  fi
done
if [ -z "$python" ]; then
  echo "error: no Python from 3.10 to 3.12 was found (python3 is $(python3 --version 2>&1 || echo missing))" >&2
  echo "remedy: sudo apt-get install python3.12 python3.12-venv (or: pip install uv && uv python install 3.12), then make PYTHON=python3.12" >&2
  exit 1
fi
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')

"$python" -c 'import ensurepip, venv' 2>/dev/null || system_package "python$version-venv" "to make a virtual environment"
"$python" -c "import ctypes; ctypes.CDLL('libpython$version.so.1.0')" 2>/dev/null ||
  [ -e "$("$python" -c 'import sys; print(sys.base_prefix)')/lib/libpython$version.so.1.0" ] ||
  system_package "libpython$version" "Triton's Python backend links against it"

echo "setting up $venv with Python $version (some minutes, about 2.5 GB)"
"$python" -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]' 2> >(grep -v '^WARNING: Location' >&2)
