#!/usr/bin/env bash
# Collect what a GPU machine without registries needs, in parts that can be carried there one at a time.
# Usage: bench/gpu/prepare.sh [FOLDER]   (default .gpu, which git ignores)
# Needs the package registries and the .venv that `make setup` makes.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-.gpu}
python=.venv/bin/python
part_bytes=40000000 # the working tree and a part must travel together in 64 MiB

rm -rf "$out"
mkdir -p "$out/payload/wheels"
platforms=()
for platform in manylinux_2_28_x86_64 manylinux_2_27_x86_64 manylinux_2_24_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64 manylinux_2_12_x86_64 manylinux2010_x86_64 manylinux_2_5_x86_64 manylinux1_x86_64; do
  platforms+=(--platform "$platform")
done
echo "downloading wheels for Python 3.12"
$python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
  "${platforms[@]}" --dest "$out/payload/wheels" --requirement bench/gpu/requirements.txt 2> >(grep -v '^WARNING: Location' >&2)
echo "fetching the demo's models and data"
$python bench/gpu/payload.py "$out/payload"
tar -C "$out/payload" -cf - . | split --bytes=$part_bytes --numeric-suffixes --suffix-length=2 - "$out/part-"
rm -rf "$out/payload"
(cd "$out" && sha256sum part-* > SHA256SUMS)
du -ch "$out"/part-* | tail -n 1
echo "$out holds $(ls "$out"/part-* | wc -l) parts; carry SHA256SUMS and each part, then run bench/gpu/unpack.sh"
