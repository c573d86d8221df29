"""Ranks exchange records as JSON of known types: what else is in the store is not read, and runs nothing."""

import base64
import pickle
from pathlib import Path

import pytest

from k25_train.config.schema import Config
from launch.preflight.counters import Counters
from launch.preflight.messages import MessageError, decode, encode
from launch.preflight.node import Node, read_node
from launch.preflight.rank import Fault, RankMeasurements
from launch.preflight.rates import Link
from launch.preflight.system import Missing
from tests.helpers.recorded_node import RecordedNode

MEASURED = RankMeasurements(
    gemm_tflops=0.1,
    links=[Link(pair=(0, 3), gb_per_s=2.0)],
    refused={8: "no route to host"},
    fault=Fault(text="exchange 1", peer=3, exchange=1),
)


def test_records_travel_between_ranks(recorded: RecordedNode, config: Config) -> None:
    node = read_node(recorded.system, "node-1", config)
    assert node.accelerators.gpus
    assert decode(encode(node), Node) == node
    node.accelerators.paths = Missing(reason="no GPU")
    node.network.counters_after = Counters(
        uptime_s=3.5, counts={"mlx5_0": {"packet_seq_err": 2}}, unread={"mlx5_1": "no ethtool"}
    )
    assert decode(encode(node), Node) == node
    for measured in (MEASURED, RankMeasurements()):
        assert decode(encode(measured).encode(), RankMeasurements) == measured
    assert decode(encode(True), bool) is True


WRONG = {
    "a pickle": base64.b64encode(pickle.dumps(MEASURED)).decode(),
    "no JSON": "{",
    "no bytes of a text": b"\xff\xfe",
    "nested too deeply": "[" * 100_000,
    "another type": encode(Missing(reason="x")),
    "a number": "3",
    "no type": encode(MEASURED).replace('"type": "RankMeasurements"', '"type": "Node"'),
    "a field too many": encode(MEASURED).replace('"refused"', '"path": "/etc/passwd", "refused"'),
    "a field missing": encode(MEASURED).replace(', "exchange": 1', ""),
    "a text for a number": encode(MEASURED).replace("0.1", '"0.1"'),
    "a pair of three": encode(MEASURED).replace("[0, 3]", "[0, 3, 4]"),
    "a list for a text": encode(MEASURED).replace('"no route to host"', "[]"),
}


@pytest.mark.parametrize("text", WRONG.values(), ids=WRONG)
def test_what_is_not_of_the_type_is_refused(text: str | bytes) -> None:
    with pytest.raises(MessageError, match="not a message of type RankMeasurements"):
        decode(text, RankMeasurements)


def test_what_cannot_be_told_is_not_sent() -> None:
    with pytest.raises(TypeError, match="cannot be sent"):
        encode({"path": Path("/")})


class Intruder:
    """Its pickle makes a file when it is read."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.file), "w")


def test_a_pickle_in_the_store_runs_nothing(tmp_path: Path) -> None:
    """A rank whose message was replaced counts as silent; the others' are read."""
    import torch.distributed as dist

    from launch.preflight.coordination import Coordinator

    store = dist.HashStore()
    ranks = [
        Coordinator(store, rank=rank, world_size=3, local_rank=rank, ranks_per_node=3) for rank in range(3)
    ]
    for rank in ranks:
        rank.publish("computed", MEASURED)
    intruder = pickle.dumps(Intruder(tmp_path / "ran"))
    store.set("computed/1", base64.b64encode(intruder).decode())
    store.set("computed/2", intruder)

    assert ranks[0].collect("computed", range(3), RankMeasurements, timeout_s=5.0) == {0: MEASURED}
    assert not (tmp_path / "ran").exists()
