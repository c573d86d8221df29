"""Settings for every test, and the one reason for which a test may be skipped: no CUDA device."""

import importlib.util
import signal

import pytest
from hypothesis import settings

# No test asserts a time: a busy machine takes hundreds of times as long for a case as an idle one.
settings.register_profile("k25", deadline=None)
settings.load_profile("k25")


# A shell has background jobs ignore these, and nohup the second one; what tests start would inherit it.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked or has_cuda():
        return
    for item in marked:
        item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def has_cuda() -> bool:
    """Whether torch finds a CUDA device; torch is imported only where a test needs to know."""
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()
