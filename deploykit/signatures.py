"""Sign files and folders, and verify their signatures, with OpenSSF's model-signing and a key pair; offline.

The signature of a file is FILE.sig next to it; that of a folder is model.sig in it. It contains the SHA-256 of each file, so
that ``model_signing sign key`` and ``model_signing verify key`` read and write the same.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from deploykit.artifacts import explained, new_file
from deploykit.errors import ArtifactError, MissingDependencyError, UsageError

SIGNATURE = "model.sig"
"""Signature of the folder that it is in."""


def signature_of(target: Path) -> Path:
    """Return the path of a target's signature."""
    return target / SIGNATURE if target.is_dir() else target.with_name(f"{target.name}.sig")


def sign(target: Path, private_key: Path, signature: Path | None = None) -> Path:
    """Sign a file, or every file of a folder. Returns the path of the signature: ``signature_of(target)`` by default.

    ``private_key`` is a PEM file, without a password, of an elliptic curve (P-256, P-384 or P-521). Raises
    MissingDependencyError; UsageError for a key that cannot be used; ArtifactError.
    """
    hashing, signing, _ = _model_signing()
    signature = signature or signature_of(target)
    if not target.exists():
        raise ArtifactError(f"{target}: no such file or folder", "check the path")
    try:
        config = signing.Config().use_elliptic_key_signer(private_key=private_key)
    except Exception as error:  # of several libraries
        raise _unusable(private_key, error, "private", "openssl ecparam -name prime256v1 -genkey") from error
    config.set_hashing_config(hashing.Config().set_ignored_paths(paths=[signature.name]))
    with explained(signature), new_file(signature) as file:
        try:
            config.sign(target, file)
        except ValueError as error:  # a link in the folder
            raise ArtifactError(f"{target}: cannot be signed: {error}", "replace it by a plain file") from error
    return signature


def verify_signature(target: Path, public_key: Path, *, remedy: str | None = None) -> None:
    """Verify that the owner of a key signed a file, or every file of a folder, and that none was added or removed.

    ``public_key`` is a PEM file. Raises MissingDependencyError; UsageError for a key that cannot be used; ArtifactError,
    with ``remedy``, naming the file that differs from the signed one.
    """
    _, _, verifying = _model_signing()
    signature = signature_of(target)
    remedy = remedy or f"get it again from where it was signed, or run deploykit sign {target} --key PRIVATE_KEY"
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    except Exception as error:
        raise _unusable(public_key, error, "public", "openssl ec -in PRIVATE_KEY -pubout") from error
    if not target.exists():
        raise ArtifactError(f"{target}: no such file or folder", "check the path")
    if not signature.is_file():
        raise ArtifactError(f"{target}: is not signed: {signature} is missing", remedy)
    try:
        config.verify(target, signature)
    except Exception as error:  # of several libraries: a damaged signature raises KeyError, InvalidSignature, ...
        raise ArtifactError(_refusal(target, signature, public_key, error), remedy) from error


def _refusal(target: Path, signature: Path, public_key: Path, error: Exception) -> str:
    """Return a library's error in one line."""
    said = str(error).replace("\\'", "'")
    if changed := re.search(r"Hash mismatch for '(.+?)': Expected", said):
        return f"{target / changed[1]}: was changed after it was signed"
    if added := re.search(r"Extra files found in model '.*?': (.+?)[\"'\]]", said):
        return f"{target / added[1].split(', ')[0]}: was added after {target} was signed"
    if missing := re.search(r"Missing files in model '.*?': (.+?)[\"'\]]", said):
        return f"{target / missing[1].split(', ')[0]}: was signed, and is missing"
    if said.startswith("Key mismatch"):
        return f"{signature}: was made with another key than that of {public_key}"
    if type(error) is ValueError and said.startswith("Cannot use"):
        return f"{target}: {said.partition('.')[0]}"
    return f"{signature}: is no valid signature ({type(error).__name__})"


def _unusable(key: Path, error: Exception, kind: str, made_by: str) -> UsageError:
    if isinstance(error, OSError):
        return UsageError(f"{key}: {error.strerror or error}", "check the path of the key")
    what = "a key with a password" if "encrypted" in str(error) else f"not a {kind} key of an elliptic curve, in PEM"
    return UsageError(f"{key}: is {what}", f"{made_by} makes one")


def _model_signing() -> tuple[Any, Any, Any]:
    """Return the modules hashing, signing and verifying. Raises MissingDependencyError."""
    try:
        from model_signing import hashing, signing, verifying
    except ImportError as error:
        raise MissingDependencyError(
            f"OpenSSF's model-signing is not installed ({error.name})", "pip install 'deploykit[sign]'"
        ) from error
    return hashing, signing, verifying
