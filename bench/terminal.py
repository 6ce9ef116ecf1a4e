"""Run the README's example, and draw the terminal's output as docs/terminal.svg.

Run it in a folder with ``minilm/`` and ``tweets.csv`` (docs/get-started.md makes them). It leaves the example's folders there.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "terminal.svg"
SHOWN = 12
"""Lines of a command's output to show, the last ones."""


def main() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"^```bash\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)
    assert block is not None
    console = Console(record=True, width=110, file=io.StringIO(), highlight=False)
    servers = []
    for command in block.group(1).replace("\\\n", " ").splitlines():
        command = " ".join(command.split())
        console.print(Text("$ ", "bold green") + Text(command, "bold"))
        if command.endswith("&"):
            servers.append(
                subprocess.Popen(shlex.split(command[:-1]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            )
            continue
        started = time.perf_counter()
        done = subprocess.run(
            ["bash", "-c", command], capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "110"}
        )
        print(done.stdout + done.stderr, file=sys.stderr)
        if done.returncode:
            raise SystemExit(f"{command}: exit code {done.returncode}")
        lines = done.stdout.splitlines()
        if len(lines) > SHOWN:
            lines = ["…", *lines[-SHOWN:]]
        for line in lines:
            console.print(Text.from_ansi(line), overflow="ellipsis", no_wrap=True)
        if lines:
            console.print(Text(f"({time.perf_counter() - started:.0f} s)", "dim"))
    for server in servers:
        server.terminate()
        server.wait()
    picture = console.export_svg(title="deploykit: from tweets to a served INT8 model")
    # A page with this picture must load nothing from elsewhere.
    picture = re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL)
    PICTURE.write_text(picture, encoding="utf-8")
    print(PICTURE)


if __name__ == "__main__":
    main()
