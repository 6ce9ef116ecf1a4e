"""Run llama.cpp's server: read a job (JSON) from stdin, print the address, and end with stdin.

It runs in the peers' virtual environment, as ``generation_worker.py`` does.
"""

from __future__ import annotations

import json
import os
import sys

from generation_worker import start_llama


def main() -> None:
    address = os.fdopen(os.dup(1), "w")  # what the library prints must not mix with it
    os.dup2(2, 1)
    server = start_llama(json.loads(sys.stdin.readline()))
    print(server.listening_address, file=address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
