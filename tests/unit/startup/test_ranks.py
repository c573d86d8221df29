"""Another number of processes than configured is refused, with the command that starts the right one."""

import pytest

from k25_train.compose.resolve import compose
from k25_train.errors import ConfigError
from k25_train.startup.ranks import check_world_size

FOUR = ["experiment=smoke"]


@pytest.mark.parametrize("started", ["1", "2", "8"])
def test_another_number_of_ranks_is_refused(started: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", started)
    with pytest.raises(ConfigError) as caught:
        check_world_size(compose(FOUR))
    assert f"{started} process(es) started" in str(caught.value)
    assert "torchrun --nnodes 1 --nproc-per-node 4" in str(caught.value)
    assert "parallelism=serial cluster.nodes=1 cluster.gpus_per_node=1" in str(caught.value)


def test_the_right_number_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    check_world_size(compose(FOUR))
    monkeypatch.delenv("WORLD_SIZE")
    check_world_size(compose([*FOUR, "parallelism=serial", "cluster.gpus_per_node=1"]))


@pytest.mark.parametrize("text", ["", "four", "-1", "4.0", "٤"])
def test_a_variable_that_is_no_number_is_named(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", text)
    with pytest.raises(ConfigError, match=r"WORLD_SIZE=.*must be a whole number"):
        check_world_size(compose(FOUR))
