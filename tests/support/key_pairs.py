"""Key pairs for signatures, made by openssl."""

from __future__ import annotations

import subprocess
from pathlib import Path


def make_key_pair(folder: Path, name: str = "key") -> tuple[Path, Path]:
    """Write NAME.pem and NAME.pub.pem, an elliptic curve's. Returns the private and the public key."""
    private, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    for words in (["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", private],
                  ["ec", "-in", private, "-pubout", "-out", public]):  # fmt: skip
        subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True)
    return private, public
