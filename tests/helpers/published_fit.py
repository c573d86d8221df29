"""The one constant of each kind of device, fitted to the calibration rows of published runs."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

from k25_train.plan.pipeline import PipelinePlan, plan_pipeline
from k25_train.plan.time.plan_step import plan_step
from tests.helpers.published import Row

SAME_CHIP = {"H800": "H100", "H200": "H100"}
"""Device -> the one whose constant it takes: the same chip with other links or memory."""
BOUNDS = 0.25, 4.0
"""Between which a constant is looked for."""
HALVINGS = 14
"""After which it is known to 0.02%."""


def chip(row: Row) -> str:
    """Kind of device whose constant a row's plan needs."""
    device = row.config().cluster.rates.device
    return SAME_CHIP.get(device, device)


def planned(row: Row, kernels: float) -> PipelinePlan:
    """The plan of a row whose device's kernels take so many times longer than its data sheet says."""
    config = row.config()
    rates = config.cluster.rates
    calibration = replace(rates.calibration, kernels=kernels)
    cluster = replace(config.cluster, rates=replace(rates, calibration=calibration))
    return plan_pipeline(replace(config, cluster=cluster), assumptions=row.assumptions)


def error(row: Row, kernels: float) -> float:
    """Planned tokens a second over measured ones, less 1."""
    measured = row.measured.tokens_per_s_per_gpu
    if measured is None:
        raise ValueError(f"{row.name}: measured no tokens_per_s_per_gpu")
    return plan_step(planned(row, kernels)).tokens_per_s_per_gpu / measured - 1


def fit_all(rows: Iterable[Row]) -> Mapping[str, float]:
    """Device -> the constant with which its calibration rows are neither fast nor slow on average."""
    of_device: dict[str, list[Row]] = {}
    for row in rows:
        of_device.setdefault(chip(row), []).append(row)
    return {device: _fit(of_one) for device, of_one in of_device.items()}


def _fit(rows: list[Row]) -> float:
    low, high = BOUNDS
    for _ in range(HALVINGS):
        middle = math.sqrt(low * high)
        # Larger constants are slower.
        if sum(math.log1p(error(row, middle)) for row in rows) > 0:
            low = middle
        else:
            high = middle
    return math.sqrt(low * high)
