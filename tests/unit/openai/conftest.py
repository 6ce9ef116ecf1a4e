from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from fake_triton import FakeTriton
from openai_service import Service, serve


@pytest.fixture(scope="session")
def service() -> Iterator[Service]:
    with FakeTriton() as triton, serve(triton) as server:
        yield Service(server.url, triton)


@pytest.fixture(scope="session")
def base_url(request: pytest.FixtureRequest) -> str:
    """The server that clients are tested with: the one at DEPLOYKIT_TEST_OPENAI_URL, else one with a fake model."""
    url: str = os.environ.get("DEPLOYKIT_TEST_OPENAI_URL") or request.getfixturevalue("service").url
    return url


@pytest.fixture(scope="session")
def model() -> str:
    """The language model there."""
    return os.environ.get("DEPLOYKIT_TEST_OPENAI_MODEL", "writer")
