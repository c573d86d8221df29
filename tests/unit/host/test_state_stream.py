"""State streams through a device that notes every race (tests/helpers/racy_device.py)."""

import random
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from parallel.host.copier import Event
from parallel.host.state_stream import StateStream, StreamedLane
from tests.helpers.racy_device import RacyCopier, RacyDevice, random_delays

NUM_STEPS = 40
DEVICE_BYTES = 16_384


def plan(source: random.Random, num_elements: int) -> list[list[slice]]:
    """Rounds of pieces that together are all elements, some of them empty."""
    cuts = sorted(source.sample(range(1, num_elements), 11))
    pieces = [slice(low, high) for low, high in zip([0, *cuts], [*cuts, num_elements], strict=True)]
    rounds: list[list[slice]] = [[] for _ in range(source.randint(1, 7))]
    for piece in pieces:
        source.choice(rounds).append(piece)
    return rounds


def step(stream: StateStream, rounds: list[list[slice]], momentum: Tensor, master: Tensor) -> None:
    """The loads of Muon's step: momentum of the round that is sent next, masters two rounds at a time."""
    most = max(sum(piece.stop - piece.start for piece in pieces) for pieces in rounds)
    momenta, masters = stream.lane(most), stream.lane(most)
    directions = momenta.load([momentum[piece] for piece in rounds[0]])
    waiting = []
    for number, pieces in enumerate(rounds):
        for part in directions.tensors():
            part.mul_(0.5).add_(1.0)
        directions.write_back()
        if number + 1 < len(rounds):
            directions = momenta.load([momentum[piece] for piece in rounds[number + 1]])
        waiting.append(masters.load([master[piece] for piece in pieces]))
        if len(waiting) == 2:
            apply(waiting.pop(0))
    apply(waiting.pop(0))
    momenta.close()
    masters.close()


def apply(loaded: object) -> None:
    for part in loaded.tensors():  # type: ignore[attr-defined]
        part.mul_(0.75).sub_(0.5)
    loaded.write_back()  # type: ignore[attr-defined]


def play(seed: int) -> tuple[list[str], bool]:
    """Races of many steps, and whether all state is what it should be."""
    source = random.Random(seed)
    device = RacyDevice(DEVICE_BYTES, seed)
    copier = RacyCopier(device, random_delays(seed))
    stream = StateStream(copier)
    momentum, master = torch.randn(2, 500, generator=torch.Generator().manual_seed(seed)).unbind()
    expected = momentum.clone(), master.clone()
    is_right = True
    try:
        for _ in range(NUM_STEPS):
            step(stream, plan(source, 500), momentum, master)
            expected[0].mul_(0.5).add_(1.0)
            expected[1].mul_(0.75).sub_(0.5)
            if source.random() < 0.1:
                stream.settle()
                is_right = is_right and torch.equal(master, expected[1])
        stream.settle()
    finally:
        copier.close()
    assert device.used_bytes == 0, "buffers are freed at the end of a step"
    is_right = is_right and torch.equal(momentum, expected[0]) and torch.equal(master, expected[1])
    return device.races, is_right


@pytest.mark.parametrize("seed", range(4))
def test_no_buffer_is_used_before_its_copy_has_ended(seed: int) -> None:
    races, is_right = play(seed)
    assert not races, races[:3]
    assert is_right


def test_without_order_between_the_directions_races_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the device would show if a load did not wait for the copy that empties its buffer."""
    monkeypatch.setattr(RacyCopier, "make_device_copies_wait", lambda *_: None)
    outcomes = [play(seed) for seed in range(2)]
    assert any(races or not is_right for races, is_right in outcomes)


def test_a_load_that_nobody_wrote_back_keeps_its_buffer() -> None:
    copier = RacyCopier(RacyDevice(DEVICE_BYTES, 0), lambda: 0.0)
    lane = StateStream(copier).lane(4)
    assert isinstance(lane, StreamedLane)
    state = torch.zeros(4)
    for _ in range(2):
        lane.load([state])
    with pytest.raises(AssertionError, match="still to be written back"):
        lane.load([state])
    with pytest.raises(AssertionError, match="still to be written back"):
        lane.close()
    copier.close()


def test_the_host_waits_for_the_last_copy_before_it_reads() -> None:
    """A GPU's copies go on when the lane is closed: the twin's do not, so events are looked at here."""
    waited = []

    class Slow(RacyCopier):
        def to_host(self, device: Tensor, host: Tensor) -> Event:
            event = super().to_host(device, host)
            return SimpleNamespace(query=event.query, synchronize=lambda: waited.append(host))

    copier = Slow(RacyDevice(DEVICE_BYTES, 0), lambda: 0.0)
    stream = StateStream(copier)
    first, last = torch.zeros(4), torch.zeros(2)
    lane = stream.lane(6)
    lane.load([first, last]).write_back()
    assert not waited
    stream.settle()
    stream.settle()
    assert len(waited) == 1
    assert waited[0] is last
    lane.close()
    copier.close()
