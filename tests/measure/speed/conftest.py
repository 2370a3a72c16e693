"""Clocks that tests turn by hand."""

import pytest

from hf_sparse_pathways.measure.speed import clock


class Clock:
    """A clock that stands still unless it is told to go on."""

    def __init__(self):
        self.time = 0.0

    def now(self, _device=None):
        return self.time

    def after(self, module, seconds):
        """Let a module's call take some seconds."""

        def pass_time(*_):
            self.time += seconds

        module.register_forward_hook(pass_time)


@pytest.fixture
def still(monkeypatch):
    made = Clock()
    monkeypatch.setattr(clock, "now", made.now)
    return made
