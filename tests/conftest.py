"""Settings for every test, and the two reasons to skip one: too few CUDA devices, no inference engine."""

import importlib.util
import signal

import pytest
from hypothesis import settings

from tests.helpers.project_sources import REPO

# No test asserts a time: a busy machine takes hundreds of times as long for a case as an idle one.
settings.register_profile("k25", deadline=None)
settings.load_profile("k25")


# A shell has background jobs ignore these, and nohup the second one; what tests start would inherit it.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that need more CUDA devices than there are (`gpu` needs one, `gpus(n)` n), or an engine."""
    needed = {item: most for item in items if (most := gpus_of(item))}
    num_gpus = count_gpus() if needed else 0
    for item, most in needed.items():
        if most > num_gpus:
            reason = f"needs {most} CUDA device{'s' * (most > 1)}, this machine has {num_gpus or 'none'}"
            item.add_marker(pytest.mark.skip(reason=reason))
    if not (REPO / ".venv-engine/.installed").exists():
        for item in items:
            if item.get_closest_marker("engine"):
                item.add_marker(pytest.mark.skip(reason="needs vLLM in .venv-engine: `make engine` makes it"))


def gpus_of(item: pytest.Item) -> int:
    """CUDA devices that a test needs."""
    several = item.get_closest_marker("gpus")
    one = item.get_closest_marker("gpu")
    return several.args[0] if several is not None else int(one is not None)


def count_gpus() -> int:
    """CUDA devices that torch finds; torch is imported only where a test needs to know."""
    if importlib.util.find_spec("torch") is None:
        return 0
    import torch

    return torch.cuda.device_count()
