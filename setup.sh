#!/usr/bin/env bash
# Creates the virtual environment $1 with deploykit and all its extras; with --browser, installs a browser for the tests,
# and with --emulator, an emulator of Arm CPUs, a linker and a Python for them.
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

arm_python() { # FOLDER: unpacks Debian's Python for Arm with numpy, beside this system's packages
  command -v apt-get >/dev/null && [ -n "$(type -P qemu-aarch64-static)" ] || return 1
  echo "unpacking a Python for Arm into $1 (tests run whole models in it)"
  local parts version
  parts=$(mktemp -d) && mkdir -p "$parts"/lists/partial "$parts"/archives/partial && touch "$parts"/status
  printf '%s\n' 'APT::Architecture "arm64";' 'APT::Architectures "arm64";' 'APT::Sandbox::User "root";' "Dir::State::Lists \"$parts/lists\";" \
    "Dir::State::status \"$parts/status\";" "Dir::Cache \"$parts\";" >"$parts/apt.conf"
  APT_CONFIG=$parts/apt.conf apt-get update -qq &&
    APT_CONFIG=$parts/apt.conf apt-get install -y -qq --download-only --no-install-recommends python3 libstdc++6 >/dev/null || return 1
  rm -rf "$1.partial" && mkdir -p "$1.partial"
  for package in "$parts"/archives/*.deb; do dpkg-deb -x "$package" "$1.partial" || return 1; done
  version=$(qemu-aarch64-static -L "$1.partial" "$1.partial/usr/bin/python3" -c 'import sys; print("%d.%d" % sys.version_info[:2])') &&
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version "$version" \
      --platform manylinux2014_aarch64 --target "$1.partial/site" --constraint constraints.txt numpy || return 1
  rm -rf "$parts" && mv "$1.partial" "$1"
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
  [ -x build/arm-python/usr/bin/python3 ] || arm_python build/arm-python ||
    echo "continuing without a Python for Arm: the tests of whole models there are skipped" >&2
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

echo "setting up $venv with Python $version (some minutes, about 4 GB)"
"$python" -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]' 2> >(grep -v '^WARNING: Location' >&2)
