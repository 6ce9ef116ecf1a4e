#!/usr/bin/env bash
# Measures the demo's model (run `make demo` first): PyTorch, each engine in fp32 and INT8, and the model served
# as model_repository/sentiment/config.pbtxt, the one checked in, says.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=.venv/bin
out=bench/results/$(date +%F)-sentiment
ready=$(mktemp -u)
repository=$(mktemp -d)
mkdir "$repository/sentiment"
cp model_repository/sentiment/config.pbtxt "$repository/sentiment" # packaging keeps it; alone, for the server's memory
"$bin/deploykit" package demo/exports/sentiment --name sentiment --repository "$repository"
"$bin/deploykit" serve --repository "$repository" --http-port 0 --grpc-port 0 --metrics-port 0 --ready-file "$ready" &
server=$!
trap 'kill -INT $server; wait $server; rm -r "$repository"' EXIT
until [ -e "$ready" ]; do kill -0 $server; sleep 0.2; done
url=$("$bin/python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["http"])' "$ready")
"$bin/deploykit" bench demo/runs/sentiment demo/exports/sentiment sentiment --url "$url" \
  --data demo/runs/sentiment/splits/test.jsonl --engine openvino --engine onnxruntime --precision fp32 --precision int8 \
  --rate 100 --rounds 3 --seconds 3 --out "$out.json" --report "$out.html" --force
"$bin/python" bench/table.py
