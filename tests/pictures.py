"""Runs of the loop without their pictures, which take four fifths of the time of a run of a few
steps. A test of what a run writes asks for `pictures`."""

import pytest

from quaver import plot, train, tune


def _leave_empty(path, *rest):
    path.touch()


def leave_out():
    """Runs of this process write empty files for pictures."""
    for module in (train, tune):
        module.plot_losses = module.plot_memory = _leave_empty


@pytest.fixture
def pictures(monkeypatch):
    for module in (train, tune):
        monkeypatch.setattr(module, "plot_losses", plot.plot_losses)
        monkeypatch.setattr(module, "plot_memory", plot.plot_memory)
