#!/usr/bin/env bash
# Join the parts of prepare.sh, check their digests, and install the wheels beside the machine's own packages.
# Usage: bench/gpu/unpack.sh PARTS DEST   (PYTHON=python3 by default)
# Afterwards: PYTHONPATH=DEST/site bench/gpu/run.sh cuda DEST OUT
set -euo pipefail
parts=${1:?usage: unpack.sh PARTS DEST}
dest=${2:?usage: unpack.sh PARTS DEST}
python=${PYTHON:-python3}

[ -f "$parts/SHA256SUMS" ] || { echo "error: $parts has no SHA256SUMS" >&2; echo "remedy: run bench/gpu/prepare.sh where the registries are" >&2; exit 1; }
if ! report=$(cd "$parts" && sha256sum --check --quiet SHA256SUMS 2>&1); then
  echo "error: parts are missing or damaged: $report" >&2
  echo "remedy: carry them again" >&2
  exit 1
fi
rm -rf "$dest"
mkdir -p "$dest"
cat "$parts"/part-* | tar -C "$dest" -xf -
fits=()
for wheel in "$dest"/wheels/*.whl; do
  if "$python" -m pip install --quiet --dry-run --no-index --no-deps --target "$dest/site" "$wheel" > /dev/null 2>&1; then
    fits+=("$wheel")
  else
    echo "left out: $(basename "$wheel") does not fit $("$python" --version)"
  fi
done
"$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --no-cache-dir --target "$dest/site" "${fits[@]}" 2> >(grep -v '^WARNING: Location' >&2)
rm -rf "$dest/wheels"
echo "$dest: $(ls "$dest" | tr '\n' ' ')"
