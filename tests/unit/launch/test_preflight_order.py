"""The order of events in a preflight: all devices of a node compute at the same time."""

import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from rich.console import Console

from k25_train.config.schema import Config
from launch.preflight import job
from launch.preflight.coordination import Coordinator
from launch.preflight.node import read_node
from tests.helpers.recorded_node import RecordedNode


def test_no_device_computes_while_its_node_is_still_trying_the_run_folder(
    recorded: RecordedNode, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first rank reads all GPUs of its node under load: those of ranks that go ahead would be at rest."""
    events: list[str] = []
    node = read_node(recorded.system, "node-1", config)

    def try_folder(_config: Config, coordinator: Coordinator) -> dict[int, list[object]]:
        time.sleep(0.2)
        events.append(f"folder {coordinator.rank}")
        return {}

    def measure(_config: Config, coordinator: Coordinator, *_: object) -> dict[int, object]:
        events.append(f"measure {coordinator.rank}")
        return {}

    monkeypatch.setattr(job, "read_node", lambda *_: node)
    monkeypatch.setattr(job, "compare_job", lambda *_: {})
    monkeypatch.setattr(job, "try_shared_folder", try_folder)
    monkeypatch.setattr(job, "measure_ranks", measure)
    monkeypatch.setattr(job, "read_after_load", lambda *_: None)
    monkeypatch.setattr(job, "judge", lambda *_: {})
    monkeypatch.setattr(job, "print_report", lambda *_: None)
    store = dist.HashStore()

    def body(rank: int) -> None:
        coordinator = Coordinator(store, rank=rank, world_size=4, local_rank=rank % 2, ranks_per_node=2)
        console = Console(quiet=True)
        job.run_preflight(config, coordinator, recorded.system, "node-1", console, tmp_path)

    threads = [threading.Thread(target=body, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(events[:2]) == ["folder 0", "folder 2"]
    assert sorted(events[2:]) == [f"measure {rank}" for rank in range(4)]
