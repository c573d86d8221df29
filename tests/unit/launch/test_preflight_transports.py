"""NCCL's fallbacks, which it only tells in its log: to the host's memory, and to TCP."""

import os
from pathlib import Path

import pytest

from k25_train.compose.resolve import compose
from k25_train.config.schema import Config
from launch.preflight.findings import Verdict
from launch.preflight.measurements import judge_measurements
from launch.preflight.rank import RankMeasurements
from launch.preflight.transports import parse_transports, recorded_log

# Lines of NCCL 2.21 to 2.29, and of older ones, which have bus addresses.
LOG = """\
n1:3077:3290 [1] NCCL INFO NET/IB : Using [0]mlx5_0:1/RoCE [1]mlx5_1:1/RoCE [RO]; OOB bond0:10.0.0.1<0>
n1:3077:3290 [1] NCCL INFO GPU Direct RDMA Enabled for GPU 0 / HCA 0 (distance 4 <= 5), read 1 mode Default
n1:3077:3290 [1] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM/read
n1:3077:3290 [1] NCCL INFO Channel 00/0 : 9[1] -> 1[1] [receive] via NET/IB/1/GDRDMA
n1:3077:3290 [1] NCCL INFO Channel 00/0 : 1[1] -> 9[1] [send] via NET/IB/1(8)/GDRDMA/Shared
n1:3077:3290 [1] NCCL INFO Channel 01 : 1[1c000] -> 9[1c000] [send] via NET/IB/0
n1:3077:3290 [1] NCCL INFO Channel 02/0 : 1[1] -> 9[1] [send] via NET/Socket/0
n1:3077:3290 [1] NCCL INFO Channel 02/1 : 1[1] -> 2[2] via SHM/direct/direct
"""


def test_connections_are_counted_by_kind() -> None:
    assert parse_transports(LOG) == {"IB/GDRDMA": 2, "IB": 1, "Socket": 1}
    assert parse_transports("") == {}
    # A plugin's name with a space, and a GPU that is reached through its CPU's PCIe.
    others = [LOG.replace("NET/IB/1", "NET/AWS Libfabric/1"), LOG.replace("GDRDMA", "GDRDMA(PCI)")]
    assert parse_transports(others[0]) == {"AWS Libfabric/GDRDMA": 2, "IB": 1, "Socket": 1}
    assert parse_transports(others[1]) == parse_transports(LOG)


def test_the_log_goes_to_a_file_and_its_warnings_are_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    monkeypatch.delenv("NCCL_DEBUG_FILE", raising=False)
    with recorded_log() as log:
        assert (os.environ["NCCL_DEBUG"], os.environ["NCCL_DEBUG_SUBSYS"]) == ("INFO", "INIT,NET")
        file = Path(os.environ["NCCL_DEBUG_FILE"].replace("%h", "n1").replace("%p", "3077"))
        assert log.transports() == {}
        file.write_text(LOG + "n1:3077:3301 [1] transport/net_ib.cc:1 NCCL WARN NET/IB : Got completion\n")
        assert log.transports()["IB/GDRDMA"] == 2
    assert os.environ["NCCL_DEBUG"] == "WARN" and "NCCL_DEBUG_FILE" not in os.environ
    assert not file.parent.exists()
    assert (
        capsys.readouterr().err
        == "n1:3077:3301 [1] transport/net_ib.cc:1 NCCL WARN NET/IB : Got completion\n"
    )


def verdict(config: Config, *transports: dict[str, int] | None) -> tuple[Verdict, str]:
    """On the node of two ranks with these connections."""
    measured = {rank: RankMeasurements(transports=own) for rank, own in enumerate(transports)}
    findings = judge_measurements(measured, dict.fromkeys(measured, "a"), config)["a"]
    (finding,) = [one for one in findings if one.check == "transport between nodes"]
    assert bool(finding.remedy) == (finding.verdict > Verdict.skipped)
    return finding.verdict, finding.found


NO_GPU = [
    "cluster.device=cpu",
    "cluster.gpu=null",
    "cluster.rates.memory_gb=null",
    "train.transformer_engine=false",
]
DIRECT = {"IB/GDRDMA": 12}


@pytest.mark.parametrize(
    ("transports", "expected"),
    [
        ((DIRECT, DIRECT), (Verdict.passed, "24 by IB/GDRDMA")),
        ((DIRECT, {"IB": 12}), (Verdict.warned, "12 by IB, 12 by IB/GDRDMA")),
        (({"IB": 12}, {"IB": 12}), (Verdict.failed, "24 by IB")),
        ((DIRECT, {"Socket": 4}), (Verdict.failed, "12 by IB/GDRDMA, 4 by Socket")),
        (({}, {}), (Verdict.skipped, "no connection to another node was made")),
        ((None, None), (Verdict.skipped, "NCCL was not used")),
    ],
)
def test_what_connections_are(
    config: Config, transports: tuple[dict[str, int] | None, ...], expected: tuple[Verdict, str]
) -> None:
    assert verdict(config, *transports) == expected


def test_without_a_fabric_or_gpus_sockets_are_right(config: Config) -> None:
    assert "fabric is null" in verdict(compose(["experiment=smoke"]), {"Socket": 4})[1]
    on_cpus = compose(["experiment=k25_pretrain_4k", *NO_GPU])
    assert "gloo" in verdict(on_cpus, None)[1]
