"""Peaks of device memory over all ranks, next to the plan, on counters that are made up."""

from contextlib import nullcontext
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from k25_train.compose.resolve import compose
from k25_train.errors import TrainingError
from k25_train.training.device_memory import DeviceMemory, MemoryFigures, NoDeviceMemory, out_of_memory
from k25_train.training.hooks import NO_HOOKS

PLANNED = [50 * 10**9, 40 * 10**9]
STAGES = [0, 0, 1, 1]
CPU = torch.device("cpu")


@dataclass
class Counters:
    """An allocator's."""

    allocated: int
    reserved: int
    num_resets: int = 0

    def reset_peak_memory_stats(self, _: torch.device) -> None:
        self.num_resets += 1

    def max_memory_allocated(self, _: torch.device) -> int:
        return self.allocated

    def max_memory_reserved(self, _: torch.device) -> int:
        return self.reserved


def finished(
    monkeypatch: pytest.MonkeyPatch, allocated_gb: list[float], reserved_gb: list[float] | None = None
) -> tuple[DeviceMemory, MemoryFigures]:
    """The first rank's after a step in which ranks had so much."""
    reserved_gb = reserved_gb or allocated_gb
    memories = [
        DeviceMemory(PLANNED, STAGES, rank, CPU, Counters(int(1e9 * allocated), int(1e9 * reserved)))
        for rank, (allocated, reserved) in enumerate(zip(allocated_gb, reserved_gb, strict=True))
    ]
    sent: list[torch.Tensor] = []
    monkeypatch.setattr(dist, "all_reduce", lambda own, _: sent.append(own.clone()))
    for memory in memories:
        memory.finish_step()
    most = torch.stack(sent).amax(dim=0)
    monkeypatch.setattr(dist, "all_reduce", lambda own, _: own.copy_(most))
    return memories[0], memories[0].finish_step()


def test_the_row_has_the_worst_rank_next_to_its_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    _, figures = finished(monkeypatch, [48.0, 49.0, 41.0, 40.0], [50.0, 51.0, 45.0, 55.0])
    assert figures.peak_allocated_bytes == pytest.approx(49e9, abs=1024)
    assert figures.peak_reserved_bytes == pytest.approx(55e9, abs=1024)
    assert (figures.rank, figures.planned_bytes) == (1, 50 * 10**9)
    assert all(isinstance(value, int) for value in asdict(figures).values())


@pytest.mark.parametrize(
    ("allocated_gb", "expected"),
    [
        ([48.0, 49.0, 41.0, 40.0], ""),
        ([48.0, 54.9, 41.0, 40.0], ""),
        ([48.0, 49.0, 45.0, 40.0], "rank 2 (stage 1) had 45.00 GB of tensors at its peak, 12% more than"),
        ([30.0, 49.0, 41.0, 40.0], "rank 0 (stage 0) had 30.00 GB of tensors at its peak, 40% less than"),
        ([40.0, 49.0, 41.0, 60.0], "rank 3 (stage 1) had 60.00 GB"),
    ],
)  # fmt: skip
def test_a_rank_far_from_its_plan_is_named_once(
    monkeypatch: pytest.MonkeyPatch, allocated_gb: list[float], expected: str
) -> None:
    memory, _ = finished(monkeypatch, allocated_gb)
    text = memory.warning()
    assert expected in text and bool(expected) == bool(text)
    assert memory.warning() == ""


def test_little_memory_needs_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.unit.training.test_device_memory.PLANNED", [10**8, 10**8])
    memory, figures = finished(monkeypatch, [0.9, 0.5, 0.9, 0.9])
    assert figures.planned_bytes == 10**8 and not memory.warning()


def test_peaks_are_of_one_step() -> None:
    counters = Counters(0, 0)
    memory: Any = DeviceMemory(PLANNED, STAGES, 0, CPU, counters)
    memory.start_step()
    memory.start_step()
    assert counters.num_resets == 2


def test_an_error_tells_both_figures() -> None:
    text = DeviceMemory(PLANNED, STAGES, 3, CPU, Counters(int(44e9), int(46e9))).told()
    assert (
        text == "stage 1: 44.00 GB of tensors at the peak and 46.00 held by the allocator; 40.00 are planned"
    )


def test_a_cpu_has_no_figures() -> None:
    memory = NoDeviceMemory()
    memory.start_step()
    assert not asdict(memory.finish_step()) and not memory.warning() and not memory.told()


@pytest.mark.parametrize(
    ("overrides", "remedy"),
    [
        (["activation=k2"], "with activation.moe.swiglu_input=fp8+offload it would"),
        ([], "experts may have got more tokens"),
        # No change makes this fit, so none is proposed.
        (["cluster.rates.memory_gb=20"], "experts may have got more tokens"),
    ],
)
def test_a_device_without_memory_has_figures_and_a_remedy(overrides: list[str], remedy: str) -> None:
    memory = DeviceMemory(PLANNED, STAGES, 3, CPU, Counters(int(44e9), int(46e9)))
    config = compose(["experiment=k25_pretrain_4k", *overrides])
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    text = str(out_of_memory(error, memory.told(), config))
    assert "stage 1: 44.00 GB" in text and "40.00 are planned" in text
    assert remedy in text and "Tried to allocate 2.00 GiB" in text


def test_training_ends_with_that_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that runs out of memory, wherever in it."""
    from k25_train.training import trainer

    def run_out(_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trainer, "stall_watchdog", lambda _: nullcontext())
    monkeypatch.setattr(trainer.Trainer, "_fit", run_out)
    run: Any = SimpleNamespace(memory=NoDeviceMemory(), config=compose(["experiment=smoke"]))
    own = object.__new__(trainer.Trainer)
    own.run, own.hooks = run, NO_HOOKS
    abandoned: list[str] = []
    keeper: Any = SimpleNamespace(saver=SimpleNamespace(abandon=lambda: abandoned.append("a save")))
    own.keeper = keeper
    with pytest.raises(TrainingError, match="the device is out of memory"):
        own.fit()
    assert abandoned
