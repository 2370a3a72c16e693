"""A Hub for each test."""

import pytest

from tests.hub.endpoint import SERVER
from tests.hub.store import Hub


@pytest.fixture
def hub(monkeypatch):
    """An empty Hub, and the token of an account that is called ``me``."""
    monkeypatch.setenv("HF_TOKEN", "hf_of_me")
    SERVER.hub = Hub()
    return SERVER.hub
