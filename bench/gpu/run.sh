#!/usr/bin/env bash
# Run every step of the GPU check within six minutes, and write what each one found as it ends.
# Usage: bench/gpu/run.sh cuda|cpu PAYLOAD OUT   (PYTHON=python3 by default)
set -euo pipefail
device=${1:?usage: run.sh cuda|cpu PAYLOAD OUT}
payload=$(realpath "${2:?usage: run.sh cuda|cpu PAYLOAD OUT}")
out=${3:?usage: run.sh cuda|cpu PAYLOAD OUT}
mkdir -p "$out"
out=$(realpath "$out")
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
[ "$device" = cuda ] || export CUDA_VISIBLE_DEVICES=
exec "${PYTHON:-python3}" bench/gpu/run.py --device "$device" --payload "$payload" --out "$out" "${@:4}"
