"""Draw the page of a recorded result again: ``python bench/page.py results/X.json`` writes results/X.html."""

from __future__ import annotations

import argparse
from pathlib import Path

from suite import say

from deploykit.errors import DeploykitError
from deploykit.report.pages import write_report
from deploykit.report.record import read_record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("record", type=Path, nargs="+", help="of deploykit bench --output, or of a suite")
    for path in parser.parse_args().record:
        try:
            write_report(read_record(path), path.with_suffix(".html"))
        except DeploykitError as error:
            raise SystemExit(f"error: {error}") from None
        say(f"{path.with_suffix('.html')}: written")


if __name__ == "__main__":
    main()
