"""Each key of a cluster's file that most sites leave off: the script and steps that it leads to."""

from dataclasses import fields
from pathlib import Path

import pytest

from k25_train.config.cluster import ClusterConfig
from k25_train.config.fabric import FabricConfig
from k25_train.config.slurm import SlurmConfig
from tests.helpers.cluster_keys import KEYS, submitted
from tests.helpers.project_sources import REPO
from tests.helpers.shellcheck import complaints

GOLDEN = REPO / "tests/golden/sbatch/keys"
ELSEWHERE = {
    "partition", "account", "qos", "time_limit_min", "stop_before_end_s", "spare_nodes", "min_nodes",
    "restart_wait_s", "preflight", "rendezvous_port", "python", "container_mounts", "switches_wait_min",
    "gid_index", "traffic_class", "ack_timeout", "retries", "mtu_bytes",
}  # fmt: skip
"""Keys that the clusters' own golden files, or tests of the command, have."""


@pytest.mark.parametrize("key", KEYS)
def test_a_key_leads_to_its_golden_script(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    golden, fresh = GOLDEN / f"{key}.sbatch", tmp_path / f"{key}.sbatch"
    fresh.write_text(submitted(key, monkeypatch))
    assert fresh.read_text() == golden.read_text(), f"if the change is meant: cp {fresh} {golden}"


def test_every_key_has_one() -> None:
    sections = (SlurmConfig, FabricConfig)
    keys = {field.name for section in sections for field in fields(section)} - ELSEWHERE
    own = {field.name for field in fields(ClusterConfig)} & {"environment", "overrides", "secrets"}
    assert keys | own == set(KEYS) == {path.stem for path in GOLDEN.glob("*.sbatch")}


def test_shellcheck_has_nothing_to_say_to_any() -> None:
    assert complaints(sorted(GOLDEN.glob("*.sbatch"))) == ""
