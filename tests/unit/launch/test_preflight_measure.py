"""Rates of a device."""

import time

import pytest
import torch

from launch.preflight.measure import LOADS, measure_gemm


def test_the_device_computes_while_its_clocks_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long nvidia-smi takes to answer: an idle GPU's clocks say nothing."""
    started: list[int] = []
    mm = torch.mm

    def counted(*args: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        started.append(1)
        return mm(*args, out=out)

    seen: list[int] = []

    def read() -> None:
        time.sleep(LOADS["cpu"].seconds)
        before = len(started)
        time.sleep(LOADS["cpu"].seconds)
        seen.append(len(started) - before)

    monkeypatch.setattr(torch, "mm", counted)
    assert measure_gemm(torch.device("cpu"), read) > 0
    assert seen[0] > 0


def test_what_cannot_be_read_under_load_is_reported() -> None:
    def broken() -> None:
        raise RuntimeError("no clocks")

    with pytest.raises(RuntimeError, match="no clocks"):
        measure_gemm(torch.device("cpu"), broken)
