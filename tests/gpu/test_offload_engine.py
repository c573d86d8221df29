"""Offloading of activations on a GPU, with concurrent work on other streams."""

import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from parallel.activations.offload import OffloadEngine
from parallel.activations.order import offload_order
from parallel.activations.pool import HostBudgetError
from parallel.activations.ticket import Ticket
from parallel.host.copier import CudaCopier
from parallel.host.memory import HostMemoryError
from parallel.pipeline.schedule import PassKey, schedule_of
from tests.helpers.faulty_offload import InlineReload
from tests.helpers.gpu import in_fresh_process

pytestmark = pytest.mark.gpu

MIB = 2**20
KEY = PassKey(0, 0)
LONG = 10**8
"""Clock cycles for which a stream sleeps: some hundredths of a second."""


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def copier(device: torch.device) -> Iterator[CudaCopier]:
    made = CudaCopier(device)
    yield made
    made.close()


def draw(num_elements: int, seed: int, device: torch.device) -> Tensor:
    """Values that are told apart from those of every other seed."""
    return torch.arange(num_elements, device=device, dtype=torch.int32) * 7 + seed * 1_000_003


class Stress:
    """Work on side streams that allocates, writes and frees device memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams = [torch.cuda.Stream(device) for _ in range(3)]

    def start(self, source: random.Random) -> None:
        for stream in self._streams:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(source.randrange(10**6))
                torch.empty(source.randrange(1, MIB), device=self._device).fill_(-1)
        torch.empty(source.randrange(1, MIB), device=self._device).fill_(-1)


@pytest.mark.parametrize("seed", range(40))
def test_no_tensor_is_ever_wrong(seed: int, device: torch.device, copier: CudaCopier) -> None:
    source = random.Random(seed)
    pp, vpp = source.choice([(1, 1), (2, 1), (4, 1), (2, 2), (4, 2)])
    passes = schedule_of(pp, vpp, 2 * pp, pp, source.randrange(pp))
    order = offload_order(passes, source.randint(1, 3))
    device_bytes = source.choice([0, 2 * MIB, 64 * MIB])
    engine = OffloadEngine(copier, 256 * MIB, device_bytes)
    stress = Stress(device)
    held: dict[PassKey, list[tuple[Ticket, int, int]]] = {}
    # Compared on the device and read at the end: nothing but the engine may make the host wait.
    wrong = torch.zeros((), device=device, dtype=torch.int64)
    for position, each in enumerate(passes):
        key = each.key
        for coming in order.prefetch.get(position, ()):
            engine.prefetch(coming)
        torch.cuda._sleep(source.randrange(2 * 10**6))
        stress.start(source)
        if each.is_forward:
            for _ in range(source.randint(1, 4)):
                num_elements, number = source.randrange(1, MIB), source.randrange(1000)
                ticket = engine.save(draw(num_elements, number, device), key)
                held.setdefault(key, []).append((ticket, num_elements, number))
                stress.start(source)
        else:
            tickets = held.pop(key)
            while tickets:
                ticket, num_elements, number = tickets.pop()
                if source.random() < 0.9:
                    found = engine.load(ticket)
                    wrong += (found != draw(num_elements, number, device)).sum()
                    del found
                del ticket
                stress.start(source)
    engine.check_empty()
    stats = engine.read_stats()
    assert wrong.item() == 0
    assert stats.peak_device_bytes <= device_bytes
    assert stats.saved_bytes > 0


@pytest.mark.parametrize(("engine_type", "is_right"), [(InlineReload, False), (OffloadEngine, True)])
def test_a_reload_does_not_overtake_the_save(
    engine_type: type[OffloadEngine], is_right: bool, copier: CudaCopier, device: torch.device
) -> None:
    """NVIDIA/Megatron-LM issue 7398: the copy to the host is still to come as backward asks for it."""
    engine = engine_type(copier, 16 * MIB, 16 * MIB)
    tensor = draw(MIB, 1, device)
    torch.cuda.synchronize()
    with torch.cuda.stream(copier._to_host_stream):
        torch.cuda._sleep(10 * LONG)
    ticket = engine.save(tensor, KEY)
    assert torch.equal(engine.load(ticket), tensor) == is_right


def test_saves_and_prefetches_do_not_hold_the_host(copier: CudaCopier, device: torch.device) -> None:
    engine = OffloadEngine(copier, 16 * MIB, 16 * MIB)
    tensor = draw(MIB, 1, device)
    torch.cuda.synchronize()
    torch.cuda._sleep(10 * LONG)
    asleep = torch.cuda.Event()
    asleep.record()
    ticket = engine.save(tensor, KEY)
    engine.prefetch(KEY)
    found = engine.load(ticket)
    assert not asleep.query()
    assert torch.equal(found, tensor)


def test_device_memory_falls_and_comes_back(copier: CudaCopier, device: torch.device) -> None:
    engine = OffloadEngine(copier, 64 * MIB, 4 * MIB)
    before = torch.cuda.memory_allocated(device)
    tickets = [engine.save(draw(MIB, number, device), KEY) for number in range(8)]
    assert torch.cuda.memory_allocated(device) - before <= 4 * MIB
    for number in reversed(range(8)):
        assert torch.equal(engine.load(tickets.pop()), draw(MIB, number, device))
    engine.check_empty()
    assert torch.cuda.memory_allocated(device) == before
    stats = engine.read_stats()
    assert stats.load_stall_s > 0
    assert stats.peak_host_bytes == 32 * MIB


def test_autograd_saves_through_it(copier: CudaCopier, device: torch.device) -> None:
    torch.manual_seed(1)
    layers = torch.nn.Sequential(torch.nn.Linear(512, 2048), torch.nn.GELU(), torch.nn.Linear(2048, 64))
    layers.to(device)
    inputs = torch.randn(256, 512, device=device)
    parameters = list(layers.parameters())
    expected = torch.autograd.grad(layers(inputs).square().sum(), parameters)
    engine = OffloadEngine(copier, 64 * MIB, 0)
    with torch.autograd.graph.saved_tensors_hooks(lambda each: engine.save(each, KEY), engine.load):
        loss = layers(inputs).square().sum()
    found = torch.autograd.grad(loss, parameters)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    engine.check_empty()


def test_memory_of_the_host_is_pinned_to_the_byte(copier: CudaCopier, device: torch.device) -> None:
    engine = OffloadEngine(copier, 3 * MIB, 0)
    assert engine._pool._memory.is_pinned()
    assert engine._pool._memory.nbytes == 3 * MIB
    ticket = engine.save(draw(MIB // 2, 1, device), KEY)
    with pytest.raises(HostBudgetError, match=r"activation\.host_gib"):
        engine.save(draw(MIB, 2, device), KEY)
    assert torch.equal(engine.load(ticket), draw(MIB // 2, 1, device))
    engine.close()
    assert not engine._pool._memory.is_pinned()


def pin_twice() -> str:
    copier = CudaCopier(torch.device("cuda", 0))
    memory = torch.empty(MIB, dtype=torch.uint8)
    copier.pin(memory)
    try:
        copier.pin(memory)
    except HostMemoryError as error:
        return str(error)
    return ""


def test_a_host_that_cannot_pin() -> None:
    # In a process of its own, for CUDA remembers the error.
    assert "cudaHostRegister fails with error" in in_fresh_process(pin_twice)
