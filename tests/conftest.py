import os
import sys

import each_choice
import pytest
from pictures import leave_out, pictures  # noqa: F401 (a fixture)
from runs import settings  # noqa: F401 (a fixture)

from quaver.machine import why_not_cuda

CLIENT_SETTINGS = ("ACCELERATE_", "FSDP_")

leave_out()


def pytest_addoption(parser):
    parser.addoption(
        "--each-choice",
        action="store_true",
        help="of parametrized tests as many cases as have every value (tests/each_choice.py)",
    )


def pytest_collection_modifyitems(config, items):
    reason = why_not_cuda()
    if reason is not None:
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason=f"no CUDA here: {reason}"))
    if config.getoption("--each-choice"):
        items[:], left = each_choice.select(items)
        config.hook.pytest_deselected(items=left)


def client_settings():
    return {name: value for name, value in os.environ.items() if name.startswith(CLIENT_SETTINGS)}


@pytest.fixture(autouse=True)
def no_accelerator_of_another_test():
    """Accelerate keeps the first settings of a process, also in the environment, and has no others.

    Without this a test's outcome depends on which tests its process has run before.
    """
    before = client_settings()
    yield
    for name in client_settings():
        del os.environ[name]
    os.environ.update(before)
    states = sys.modules.get("accelerate.state")
    if states is not None:
        states.AcceleratorState._reset_state(reset_partial_state=True)
        states.GradientState._reset_state()
