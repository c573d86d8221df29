"""Another number of processes than configured is refused, with the command that starts the right one."""

import pytest

from k25_train.compose.resolve import compose
from k25_train.errors import ConfigError
from k25_train.joining.environment import read_environment
from k25_train.joining.place import check_world_size

MEETING = {"RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("started", ["1", "2", "8"])
def test_another_number_of_ranks_is_refused(started: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_world_size(compose(["experiment=smoke"]), read_environment({**MEETING, "WORLD_SIZE": started}))
    assert f"{started} process(es) started" in str(caught.value)
    assert "--nnodes 1 --nproc-per-node 4" in str(caught.value)


@pytest.mark.parametrize(
    ("experiment", "module"), [("smoke", "k25_train.train"), ("rl_smoke", "k25_train.rl")]
)
def test_the_remedy_is_the_command_of_the_run(experiment: str, module: str) -> None:
    with pytest.raises(ConfigError, match=f"-m {module} …"):
        check_world_size(
            compose([f"experiment={experiment}"]), read_environment({**MEETING, "WORLD_SIZE": "3"})
        )


def test_the_right_number_is_not() -> None:
    check_world_size(compose(["experiment=smoke"]), read_environment({**MEETING, "WORLD_SIZE": "4"}))
    alone = compose(["experiment=smoke", "parallelism=serial", "cluster.gpus_per_node=1"])
    check_world_size(alone, read_environment({}))
    # What an earlier session has left does no harm.
    check_world_size(alone, read_environment({"RANK": "3", "LOCAL_RANK": "x", "MASTER_PORT": ""}))
