import pytest

from quaver.machine import why_not_cuda


def pytest_collection_modifyitems(items):
    reason = why_not_cuda()
    if reason is None:
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason=f"no CUDA here: {reason}"))
