"""The certificate of the OpenAI port."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from deploykit.errors import UsageError


@dataclass(frozen=True)
class Certificate:
    """A certificate chain and its private key, PEM files. Raises UsageError if they cannot be used."""

    certfile: Path
    keyfile: Path

    def __post_init__(self) -> None:
        def encrypted() -> NoReturn:
            raise UsageError(f"{self.keyfile}: the key is encrypted", "give a key without a passphrase")

        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.certfile, self.keyfile, encrypted)
        except OSError as error:  # SSLError is one
            raise UsageError(
                f"--ssl-certfile {self.certfile}, --ssl-keyfile {self.keyfile}: {error}",
                "give a certificate and its private key, as PEM files",
            ) from error
