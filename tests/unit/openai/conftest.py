from __future__ import annotations

import os
from collections.abc import Iterator

import openai
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


@pytest.fixture(scope="module")
def client(base_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        yield client
