"""Offloading of activations against a device that shows every race (tests/helpers/racy_device.py)."""

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from parallel.activations.offload import OffloadEngine, OffloadStats
from parallel.activations.order import OffloadOrder, offload_order
from parallel.activations.pool import HostBudgetError
from parallel.activations.sizes import BLOCK_BYTES
from parallel.activations.ticket import Ticket
from parallel.host.copier import Event, ThreadCopier
from parallel.host.memory import HostMemoryError
from parallel.pipeline.schedule import Pass, PassKey, schedule_of
from tests.helpers.faulty_offload import InlineReload
from tests.helpers.racy_device import RacyCopier, RacyDevice, random_delays

NUM_SCHEDULES = 1000
NUM_FAST_SCHEDULES = 300
SCHEDULES_A_TEST = 100
SCARCE_BYTES = 2**14
"""Host memory that some schedules do with and others do not."""
KEY = PassKey(0, 0)


# Random schedules ------------------------------------------------------------------------------------------


@dataclass
class Player:
    """Passes of one rank: forward passes draw and save tensors, backward passes load and compare them."""

    engine: OffloadEngine
    device: RacyDevice
    source: random.Random
    device_bytes: int
    """The engine's budget on the device."""
    held: dict[PassKey, list[tuple[Ticket, Tensor]]] = field(default_factory=dict)
    """Tickets, with what they stand for."""
    loaded: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Tensors that the engine gave back, with what they have to be."""

    def play(self, passes: list[Pass], order: OffloadOrder, *, random_prefetch: bool) -> None:
        for position, each in enumerate(passes):
            for key in order.prefetch.get(position, ()):
                self.engine.prefetch(key)
            if random_prefetch and self.held:
                self.engine.prefetch(self.source.choice(list(self.held)))
            run = self.forward if each.is_forward else self.backward
            run(each.key)

    def forward(self, key: PassKey) -> None:
        for _ in range(self.source.randint(1, 3)):
            tensor = self.draw()
            expected = tensor.clone()
            self.held.setdefault(key, []).append((self.engine.save(tensor, key), expected))
            del tensor
            kept_bytes = self.device.used_bytes - sum(found.nbytes for found, _ in self.loaded)
            assert kept_bytes <= self.device_bytes
            # What is computed next lies in whatever memory is free.
            self.draw()

    def backward(self, key: PassKey) -> None:
        for ticket, expected in reversed(self.held.pop(key)):
            for _ in range(self.source.choice([0, 1, 1, 1, 1, 1, 1, 2])):
                self.loaded.append((self.engine.load(ticket), expected))
                self.draw()
        self.compare()
        del self.loaded[: self.source.randint(0, len(self.loaded))]

    def compare(self) -> None:
        for found, expected in self.loaded:
            assert found.stride() == expected.stride()
            assert torch.equal(found, expected)

    def draw(self) -> Tensor:
        rows, columns = self.source.randint(1, 40), self.source.randint(1, 40)
        stride = self.source.choice([(columns, 1), (1, rows)])
        return self.device.draw((rows, columns), stride, self.source.choice([torch.int32, torch.int16]))


def random_passes(source: random.Random) -> list[Pass]:
    """1F1B or interleaved, of some rank."""
    pp, vpp = source.choice([(1, 1), (2, 1), (4, 1), (2, 2), (4, 2), (2, 3)])
    num_micro_batches = pp * source.randint(1, 2) if vpp > 1 else source.randint(1, 6)
    overlaps = vpp > 1 and source.random() < 0.3
    return schedule_of(pp, vpp, num_micro_batches, pp, source.randrange(pp), overlaps=overlaps)


def play(
    seed: int, engine_type: type[OffloadEngine] = OffloadEngine, copier_type: type[RacyCopier] = RacyCopier
) -> None:
    """Play a random schedule with random budgets; fails if anything is wrong."""
    source = random.Random(seed)
    device = RacyDevice(2**20, seed)
    # In total a schedule saves at most 24 passes of 3 tensors of 6400 bytes.
    host_bytes = source.choice([2**19, 2**19, SCARCE_BYTES])
    device_bytes = source.choice([0, 5_000, 20_000, 2**19])
    copier = copier_type(device, random_delays(seed))
    engine = engine_type(copier, host_bytes, device_bytes)
    player = Player(engine, device, source, device_bytes)
    passes = random_passes(source)
    order = offload_order(passes, source.randint(1, 3))
    try:
        player.play(passes, order, random_prefetch=source.random() < 0.3)
    except HostBudgetError:
        assert host_bytes == SCARCE_BYTES
    player.held.clear()
    player.loaded.clear()
    engine.check_empty()
    stats = engine.read_stats()
    engine.close()
    assert not device.races
    assert device.used_bytes == 0
    assert engine._pool.held_bytes == 0
    assert stats.peak_host_bytes <= host_bytes
    assert stats.peak_device_bytes <= device_bytes


@pytest.mark.parametrize(
    "first",
    [
        pytest.param(first, marks=[pytest.mark.slow] if first >= NUM_FAST_SCHEDULES else [])
        for first in range(0, NUM_SCHEDULES, SCHEDULES_A_TEST)
    ],
)
def test_no_tensor_is_ever_wrong(first: int) -> None:
    # Concurrently, since they mostly wait.
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(play, range(first, first + SCHEDULES_A_TEST)))


# Faults that the random schedules have to find --------------------------------------------------------------


class Done:
    """The event of a copy that nobody waits for."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class LetsGoEarly(RacyCopier):
    """Copies to the host count as done when they are started."""

    def to_host(self, device: Tensor, host: Tensor) -> Event:
        super().to_host(device, host)
        return Done()


class LoadsEarly(RacyCopier):
    """What computes does not wait for copies to the device."""

    def make_compute_wait(self, event: Event, tensor: Tensor) -> None:
        pass


def finds_a_fault(engine_type: type[OffloadEngine], copier_type: type[RacyCopier]) -> bool:
    for seed in range(50):
        try:
            play(seed, engine_type, copier_type)
        except AssertionError:
            return True
    return False


@pytest.mark.parametrize(
    ("engine_type", "copier_type"),
    [(InlineReload, RacyCopier), (OffloadEngine, LetsGoEarly), (OffloadEngine, LoadsEarly)],
)
def test_schedules_find(engine_type: type[OffloadEngine], copier_type: type[RacyCopier]) -> None:
    assert finds_a_fault(engine_type, copier_type)


# One thing at a time ----------------------------------------------------------------------------------------


@contextmanager
def started(
    host_bytes: int = 2**16, device_bytes: int = 2**16, delays: tuple[float, ...] = ()
) -> Iterator[OffloadEngine]:
    """An engine whose first copies take so many seconds."""
    left = iter(delays)
    engine = OffloadEngine(ThreadCopier(lambda: next(left, 0.0), timeout_s=60.0), host_bytes, device_bytes)
    yield engine
    engine.close()


@pytest.mark.parametrize(("engine_type", "is_right"), [(InlineReload, False), (OffloadEngine, True)])
def test_a_reload_does_not_overtake_the_save(engine_type: type[OffloadEngine], is_right: bool) -> None:
    """NVIDIA/Megatron-LM issue 7398: a backward that comes before the copy to the host is whole."""
    delays = iter([0.2, 0.0])
    engine = engine_type(ThreadCopier(lambda: next(delays)), 2**12, 2**12)
    tensor = torch.arange(1.0, 101.0)
    ticket = engine.save(tensor, KEY)
    assert torch.equal(engine.load(ticket), tensor) == is_right
    engine.close()


class OtherStream(RacyCopier):
    """What computes is a stream that the host runs ahead of, and keeps the memory that it is to use."""

    waits = True

    def __init__(self, device: RacyDevice, delay_s: Callable[[], float]) -> None:
        super().__init__(device, delay_s)
        self.kept: list[Tensor] = []

    def make_compute_wait(self, event: Event, tensor: Tensor) -> None:
        self.kept.append(tensor)

    def make_host_copies_wait(self, event: Event) -> None:
        if self.waits:
            super().make_host_copies_wait(event)


@pytest.mark.parametrize("waits", [False, True])
def test_a_block_is_not_written_while_what_it_held_is_on_its_way_back(waits: bool) -> None:
    device = RacyDevice(2**12, seed=1)
    delays = iter([0.0, 0.2, 0.0])
    copier = OtherStream(device, lambda: next(delays))
    copier.waits = waits
    engine = OffloadEngine(copier, BLOCK_BYTES, 0)
    first, second = (device.draw((100,), (1,), torch.int32) for _ in range(2))
    ticket = engine.save(first, KEY)
    engine.load(ticket)
    del ticket
    engine.save(second, KEY)
    engine.close()
    assert bool(device.races) != waits


def test_what_has_not_left_is_handed_back() -> None:
    with started(delays=(0.2,)) as engine:
        tensor = torch.ones(8)
        ticket = engine.save(tensor, KEY)
        assert engine.load(ticket).data_ptr() == tensor.data_ptr()
        assert engine.read_stats().loaded_bytes == 0


def test_prefetch_keeps_what_has_not_left() -> None:
    with started(delays=(0.1,)) as engine:
        tensor = torch.ones(8)
        ticket = engine.save(tensor, KEY)
        engine.prefetch(KEY)
        ticket.saved.to_host.synchronize()
        assert engine.load(ticket).data_ptr() == tensor.data_ptr()
        again = engine.load(ticket)
        assert again.data_ptr() != tensor.data_ptr()
        assert torch.equal(again, tensor)


def test_a_dropped_ticket_frees_its_memory() -> None:
    with started(host_bytes=BLOCK_BYTES) as engine:
        for value in range(20):
            ticket = engine.save(torch.full((128,), float(value)), KEY)
            if value % 2:
                engine.prefetch(KEY)
            del ticket
        engine.check_empty()


def test_the_device_budget_holds_and_none_is_needed() -> None:
    tensors = [torch.full((100,), float(number)) for number in range(6)]
    for device_bytes, loaded_ahead in ((0, 0), (900, 2), (10**4, 6)):
        with started(device_bytes=device_bytes) as engine:
            tickets = [engine.save(tensor, KEY) for tensor in tensors]
            for ticket in tickets:
                ticket.saved.to_host.synchronize()
            # It sees that all have arrived, and releases them.
            assert engine.read_stats().peak_device_bytes <= device_bytes
            engine.prefetch(KEY)
            assert engine.read_stats().loaded_bytes == loaded_ahead * 400
            are_there = [ticket.saved.device is not None for ticket in tickets]
            assert are_there == [number >= 6 - loaded_ahead for number in range(6)]
            for ticket, tensor in zip(reversed(tickets), reversed(tensors), strict=True):
                assert torch.equal(engine.load(ticket), tensor)
            stats = engine.read_stats()
            assert stats.loaded_bytes == (6 - loaded_ahead) * 400
            assert stats.peak_device_bytes <= device_bytes


def test_statistics() -> None:
    with started(device_bytes=0, delays=(0.05, 0.05)) as engine:
        ticket = engine.save(torch.ones(1000), KEY)
        engine.load(ticket)
        stats = engine.read_stats()
        assert (stats.saved_bytes, stats.loaded_bytes, stats.peak_host_bytes) == (4000, 4000, 4096)
        assert stats.save_stall_s >= 0.04
        assert stats.load_stall_s >= 0.04
        del ticket
        engine.check_empty()
        assert engine.read_stats() == OffloadStats(peak_host_bytes=4096)
        assert engine.read_stats() == OffloadStats()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.0),
        torch.empty(0, 4),
        torch.arange(24).view(2, 3, 4).permute(2, 0, 1),
        torch.arange(24.0).view(4, 6)[:, 1:4],
        torch.arange(4).expand(3, 4),
        torch.ones(5, dtype=torch.bfloat16),
        torch.arange(6).view(2, 3) % 2 == 0,
        torch.ones(3).to(torch.float8_e4m3fn),
    ],
    ids=lambda tensor: f"{tensor.dtype}-{tuple(tensor.shape)}-{tensor.stride()}",
)
def test_shapes_and_types(tensor: Tensor) -> None:
    with started(device_bytes=0) as engine:
        found = engine.load(engine.save(tensor, KEY))
        assert found.dtype == tensor.dtype
        assert found.stride() == torch.empty_like(tensor).stride() or not tensor.numel()
        assert torch.equal(found.float(), tensor.float())


def test_autograd_saves_through_it() -> None:
    torch.manual_seed(1)
    layers = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 4))
    inputs = torch.randn(3, 8)
    parameters = list(layers.parameters())
    expected = torch.autograd.grad(layers(inputs).square().sum(), parameters)
    with started(delays=(0.01,) * 6) as engine:
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda each: engine.save(each, KEY), engine.load)
        with hooks:
            loss = layers(inputs).square().sum()
            dropped = layers(inputs)
        found = torch.autograd.grad(loss, parameters)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        assert engine.read_stats().saved_bytes > 0
        with pytest.raises(RuntimeError, match=r"are held after the step.* of chunk 0, micro-batch 0"):
            engine.check_empty()
        del dropped
        engine.check_empty()


# Errors -----------------------------------------------------------------------------------------------------


def test_a_budget_too_small_for_one_tensor() -> None:
    message = (
        r"activation.host_gib = .*: no room for a tensor of 4000 bytes; 512 of 2048 are held, the largest "
        r"gap has 1536: raise it, or offload fewer tensors"
    )
    with started(host_bytes=2048) as engine:
        ticket = engine.save(torch.ones(4), KEY)
        with pytest.raises(HostBudgetError, match=message):
            engine.save(torch.ones(1000), KEY)
        assert torch.equal(engine.load(ticket), torch.ones(4))


def test_a_tensor_changed_on_its_way() -> None:
    with started(delays=(0.1,)) as engine:
        tensor = torch.ones(4, 2)
        ticket = engine.save(tensor, PassKey(1, 3))
        tensor.zero_()
        with pytest.raises(
            RuntimeError, match=r"shape \(4, 2\) of chunk 1, micro-batch 3 was changed in place"
        ):
            engine.load(ticket)


def test_a_handed_back_tensor_may_be_changed() -> None:
    with started(delays=(0.1,)) as engine:
        ticket = engine.save(torch.ones(4), KEY)
        engine.load(ticket).zero_()
        ticket.saved.to_host.synchronize()
        engine.read_stats()
        del ticket
        engine.check_empty()


def test_a_tensor_of_another_device() -> None:
    with (
        started() as engine,
        pytest.raises(ValueError, match="on meta cannot be offloaded from cpu"),
    ):
        engine.save(torch.ones(4, device="meta"), KEY)


class CannotPin(ThreadCopier):
    def pin(self, memory: Tensor) -> None:
        raise HostMemoryError("cudaHostRegister fails with error 2")


def test_a_host_that_cannot_pin() -> None:
    message = r"activation.host_gib: the host has no 0.0009766 GiB .*error 2\): lower it, or raise the limit"
    with pytest.raises(HostMemoryError, match=message):
        OffloadEngine(CannotPin(), 2**20, 0)


class Fails(ThreadCopier):
    def _copy(self, source: Tensor, target: Tensor, delay_s: float) -> None:
        raise OSError("the bus is gone")


def test_a_failed_copy_is_not_taken_for_done() -> None:
    engine = OffloadEngine(Fails(), 2**12, 0)
    with pytest.raises(OSError, match="the bus is gone"):
        engine.save(torch.ones(4), KEY)
    engine.close()
