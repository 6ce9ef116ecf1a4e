"""The SBOM that docs/security.md makes, by cyclonedx-bom in an environment of its own, names all that is installed."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CYCLONEDX = Path(os.environ.get("SBOM_VENV", "/tmp/deploykit-sbom")) / "bin" / "cyclonedx-py"


@pytest.mark.skipif(not CYCLONEDX.is_file(), reason=f"{CYCLONEDX} is missing: make interop installs it")
def test_the_sbom_names_every_package_with_version_and_what_needs_what(tmp_path: Path) -> None:
    path = tmp_path / "sbom.json"
    # It validates what it writes against CycloneDX' schema.
    subprocess.run([CYCLONEDX, "environment", sys.prefix, "--output-file", path], check=True)
    sbom = json.loads(path.read_text())
    assert sbom["bomFormat"] == "CycloneDX"
    named = {(part["name"], part["version"]) for part in sbom["components"]}
    assert named == {(found.metadata["Name"], found.version) for found in importlib.metadata.distributions()}
    parts = {part["name"]: part for part in sbom["components"]}
    assert parts["numpy"]["purl"] == f"pkg:pypi/numpy@{parts['numpy']['version']}"
    assert parts["deploykit"]["licenses"][0]["license"]["id"] == "Apache-2.0"
    [needs] = [one["dependsOn"] for one in sbom["dependencies"] if one["ref"] == parts["deploykit"]["bom-ref"]]
    assert parts["tokenizers"]["bom-ref"] in needs
