"""Ranks started by hand get the environment of a submitted job; the shell is told what they do not get."""

from pathlib import Path

import pytest

from k25_train.compose.resolve import compose
from launch.sbatch import render
from launch.torchrun import variables_of
from launch.variables import FOREIGN, foreign_in, unset_foreign

TWO = ["experiment=smoke", "parallelism=serial", "cluster.nodes=2", "cluster.gpus_per_node=1"]


def test_variables_of_the_shell_do_not_reach_the_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    shell = {"NCCL_IB_DISABLE": "1", "NCCL_ALGO": "Ring", "PATH": "/bin", "GLOO_SOCKET_IFNAME": "eth1"}
    found = variables_of(compose(TWO), shell)
    assert not [name for name in found if name.startswith("NCCL_")]
    assert (found["PATH"], found["GLOO_SOCKET_IFNAME"], found["OMP_NUM_THREADS"]) == ("/bin", "eth1", "1")
    (line,) = capsys.readouterr().out.splitlines()
    assert "not passed on to the ranks: NCCL_ALGO, NCCL_IB_DISABLE of this shell" in line
    assert "`environment:` of conf/cluster/local.yaml" in line


def test_what_the_cluster_file_sets_is_set(capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever the shell has of the same name; an equal value, and what images set, needs no word."""
    config = compose(["experiment=k25_pretrain_4k"])
    wanted = variables_of(config, {})
    assert wanted["NCCL_IB_TC"] and capsys.readouterr().out == ""
    assert variables_of(config, {"NCCL_IB_TC": wanted["NCCL_IB_TC"], "NCCL_VERSION": "2.29"}) == wanted
    assert capsys.readouterr().out == ""
    assert variables_of(config, {"NCCL_IB_TC": "0"}) == wanted
    assert "not passed on to the ranks: NCCL_IB_TC of" in capsys.readouterr().out


def test_a_job_script_unsets_the_same() -> None:
    config = compose(["experiment=k25_pretrain_4k"])
    script = render(config, Path("/runs/a"), Path("/code"), "python")
    assert f"\n{unset_foreign()}\n" in script
    for start in FOREIGN:
        assert f"${{!{start}@}}" in script and foreign_in({f"{start}X": "1"}, {}) == [f"{start}X"]
