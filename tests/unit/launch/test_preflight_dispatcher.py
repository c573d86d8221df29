"""Dispatchers whose versions, driver or libraries are known not to work are refused beforehand."""

from typing import Any

import pytest

from k25_train.compose.resolve import compose
from k25_train.config.schema import Config
from launch.preflight.dispatcher import KNOWN_BAD, Shmem, judge_dispatcher, read_shmem
from launch.preflight.findings import Finding, Verdict
from launch.preflight.system import Build
from tests.helpers.recorded_node import RecordedNode

SOUND_BUILD: dict[str, Any] = {
    "cuda": "13.0", "nccl": {"nvidia-nccl-cu13": "2.30.4"}, "nvshmem": "3.4.5", "deep_ep": "1.2.1",
    "transformer_engine": "2.20.0",
}  # fmt: skip
SOUND_NODE: dict[str, Any] = {
    "has_gdrcopy": True, "maps_peers": True, "has_peermem": True, "rdma_core": 60
}  # fmt: skip


def config_of(kind: str, *more: str) -> Config:
    capacity = "2" if kind == "ncclep" else "null"
    keys = [f"parallelism.dispatcher={kind}", f"parallelism.dispatcher_capacity={capacity}", *more]
    return compose(["experiment=k25_pretrain_4k", *keys])


def judge(kind: str, *more: str, **changes: Any) -> Finding:
    """The verdict on a sound node with these changes."""
    node = {name: changes.pop(name) for name in [*changes] if name in SOUND_NODE}
    return judge_dispatcher(
        config_of(kind, *more), Shmem(**SOUND_NODE | node), Build(**SOUND_BUILD | changes)
    )


@pytest.mark.parametrize("kind", ["alltoall", "deepep", "hybridep", "ncclep"])
def test_a_sound_node_runs_any_of_them(kind: str) -> None:
    assert judge(kind).verdict is Verdict.passed


BAD = [
    ("deepep", {"deep_ep": "2.1.0"}, "interface of DeepEP 1 only"),
    ("deepep", {"nvshmem": "3.2.5"}, "needs 3.3.9 or later"),
    ("deepep", {"nvshmem": "3.5.19"}, "issues 553, 707, 764"),
    ("hybridep", {"rdma_core": 50}, "needs rdma-core 60"),
    ("hybridep", {"has_peermem": False}, "PR 749"),
    ("ncclep", {"nccl": {"nvidia-nccl-cu13": "2.29.7"}}, "needs 2.30.4"),
]
"""One fault for each row of `KNOWN_BAD`, in its order."""


@pytest.mark.parametrize(("kind", "changes", "rule"), BAD, ids=[rule for *_, rule in BAD])
def test_a_known_bad_pair_is_refused(kind: str, changes: dict[str, Any], rule: str) -> None:
    own = judge(kind, **changes)
    assert own.verdict is Verdict.failed and rule in own.rule and own.remedy
    # alltoall needs none of it.
    assert judge("alltoall", **changes).verdict is Verdict.passed


def test_every_row_of_the_table_has_a_fault() -> None:
    assert [known.dispatcher for known in KNOWN_BAD] == [kind for kind, *_ in BAD]
    assert all(rule in known.rule for known, (*_, rule) in zip(KNOWN_BAD, BAD, strict=True))


@pytest.mark.parametrize(("kind", "changes", "rule"), BAD, ids=[rule for *_, rule in BAD])
def test_within_a_node_only_what_matters_there_is_refused(
    kind: str, changes: dict[str, Any], rule: str
) -> None:
    known = next(each for each in KNOWN_BAD if rule in each.rule)
    own = judge(kind, "parallelism.ep=8", **changes)
    assert own.verdict is (Verdict.passed if known.between_nodes else Verdict.failed)


def test_a_build_with_the_fix_is_not_refused() -> None:
    assert judge("deepep", deep_ep="1.2.1+29d31c0", nvshmem="3.5.19").verdict is Verdict.passed


@pytest.mark.parametrize(
    ("changes", "verdict", "found"),
    [
        ({"deep_ep": None}, Verdict.failed, "no deep_ep"),
        ({"has_gdrcopy": False}, Verdict.warned, "no /dev/gdrdrv"),
        ({"maps_peers": False}, Verdict.warned, "does not map peers"),
        (
            {"maps_peers": False, "has_gdrcopy": False},
            Verdict.failed,
            "does not map peers, and no /dev/gdrdrv",
        ),
        ({"rdma_core": 50}, Verdict.warned, "rdma-core 50"),
    ],
)
def test_what_deepep_needs_of_the_driver(changes: dict[str, Any], verdict: Verdict, found: str) -> None:
    own = judge("deepep", **changes)
    assert own.verdict is verdict and found in own.found


def test_the_version_of_rdma_core_is_that_of_its_library(recorded: RecordedNode) -> None:
    assert read_shmem(recorded.system).rdma_core is None
    recorded.write("usr/lib/x86_64-linux-gnu/libibverbs.so.1.14.50.0", "")
    assert read_shmem(recorded.system).rdma_core == 50
