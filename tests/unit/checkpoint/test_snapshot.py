"""The copy of a rank's state: of one moment, whatever copies and updates do meanwhile, in one region."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from k25_train.checkpoint import snapshot as module
from k25_train.checkpoint.files.parts import whole
from k25_train.checkpoint.snapshot import Snapshot, build_snapshot
from k25_train.errors import CheckpointError
from parallel.host.copier import ThreadCopier
from parallel.host.memory import HostMemoryError
from tests.helpers.racy_device import RacyCopier, RacyDevice, Range, random_delays

SIZES = {"weights": (1001, torch.bfloat16), "master": (1001, torch.float32), "bias": (16, torch.float32)}


def piece(name: str, tensor: Tensor) -> Any:
    part = whole(name, tensor.dtype, tuple(tensor.shape))
    return SimpleNamespace(part=part, tensor=tensor, is_buffer=name == "bias")


def drawn(device: RacyDevice) -> dict[str, Tensor]:
    return {
        name: device.empty((size,), (1,), dtype).copy_(torch.arange(size) % 100)
        for name, (size, dtype) in SIZES.items()
    }


def play(seed: int, *, waits: bool) -> tuple[list[str], list[bool]]:
    """Steps that change buffers, then the rest, with a save every other step: races, and whether each copy is
    of its moment."""
    device = RacyDevice(32_768, seed)
    copier = RacyCopier(device, random_delays(seed))
    snapshot, state, right = Snapshot(copier, copier), drawn(device), []

    def change(names: list[str]) -> None:
        for name in names:
            with device.at_work(Range.of(state[name], is_written=True)):
                state[name].add_(1)

    for step in range(30):
        if step % 2 == 0:
            moment = {name: tensor.clone() for name, tensor in state.items()}
            copied = snapshot.take([piece(name, tensor) for name, tensor in state.items()])
        change(["bias"])
        assert snapshot.wait_to_update() == (step % 2 == 0) if waits else True
        change(["weights", "master"])
        if step % 2 == 0:
            copied.wait()
            right.append(all(torch.equal(tensor, moment[part.name]) for part, tensor in copied.parts))
    snapshot.close()
    return device.races, right


def test_copies_are_of_their_moment_and_updates_wait_for_them() -> None:
    for seed in range(4):
        races, right = play(seed, waits=True)
        assert not races
        assert right == [True] * 15


def test_an_update_that_does_not_wait_is_noticed() -> None:
    assert any(play(seed, waits=False)[0] for seed in range(4))


def test_it_has_the_memory_of_the_pieces_once() -> None:
    tensors = [torch.randn(100_003), torch.randn(7, dtype=torch.float64), torch.randn(50_001).bfloat16()]
    pieces = [piece(f"tensor {number}", tensor) for number, tensor in enumerate(tensors)]
    snapshot = build_snapshot(torch.device("cpu"))

    addresses = set()
    for _ in range(3):
        copied = snapshot.take(pieces)
        copied.wait()
        assert all(torch.equal(copy, own) for (_, copy), own in zip(copied.parts, tensors, strict=True))
        addresses.add(copied.parts[0][1].data_ptr())

    assert len(addresses) == 1
    shard_bytes = sum(tensor.nbytes for tensor in tensors)
    assert copied.num_bytes == shard_bytes <= snapshot.num_bytes <= 1.001 * shard_bytes
    ranges = sorted((each.data_ptr(), each.data_ptr() + each.nbytes) for _, each in copied.parts)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ranges))


def test_state_of_device_and_host_is_copied_by_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device's tensors are those that say so; meta tensors have no values to copy."""
    used: list[tuple[str, str]] = []

    class Noting(ThreadCopier):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def to_host(self, device: Tensor, host: Tensor) -> Any:
            used.append((self.name, device.device.type))
            return super().to_host(torch.zeros_like(host) if device.is_meta else device, host)

    snapshot = Snapshot(Noting("device's"), Noting("host's"))
    copied = snapshot.take([piece("weights", torch.ones(4, device="meta")), piece("master", torch.ones(4))])
    copied.wait()
    assert used == [("device's", "meta"), ("host's", "cpu")]
    assert len(copied.events) == 2
    assert copied.parts[1][1].tolist() == [1.0] * 4


def test_a_host_without_memory_is_named_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(num_bytes: int) -> Tensor:
        raise HostMemoryError(f"{num_bytes} bytes cannot be mapped")

    monkeypatch.setattr(module, "map_pages", refuse)
    with pytest.raises(
        CheckpointError, match=r"no 4.48e-07 GB .* copy of its state .*ulimit -l.* more nodes"
    ):
        build_snapshot(torch.device("cpu")).take([piece("weights", torch.ones(100))])
