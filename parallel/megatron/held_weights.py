"""Weights do not change while a schedule runs: modules may derive from them what all its passes share.

A module that does so has `hold_weights`, called before the passes of each run, and `release_weights`, called
behind them. Between the two, data parallelism may still be gathering: what is derived from a weight has to be
made in a forward pass of the module whose parameter it is, or of one inside, which waits for it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn


@contextmanager
def held_weights(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within: the weights of these modules do not change, but for what is being gathered."""
    deriving = [
        each
        for module in modules
        for each in module.modules()
        if callable(getattr(each, "hold_weights", None))
    ]
    for each in deriving:
        each.hold_weights()  # type: ignore[operator]
    try:
        yield
    finally:
        for each in deriving:
            each.release_weights()  # type: ignore[operator]
