"""The place of a rank by the variables of its launcher, right or left over from another session."""

import os
import socket
import subprocess
import sys

import pytest

from k25_train.compose.resolve import compose
from k25_train.errors import ConfigError
from k25_train.joining.environment import number_of, read_environment, speaks
from k25_train.joining.place import JoinError, check_place, check_world_size
from tests.helpers.project_sources import REPO
from tests.helpers.ranks import free_port

RANK_3 = {
    "RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "n0",
    "MASTER_PORT": "29500",
}  # fmt: skip


def test_a_rank_is_what_its_launcher_says() -> None:
    where = read_environment(RANK_3)
    assert (where.rank, where.world_size, where.local_rank, where.node) == (3, 8, 1, 1)
    assert (where.address, where.port) == ("n0", 29500)
    assert not (where.is_alone or where.by_torchrun or where.opens_store or where.is_on_one_node)
    assert read_environment(RANK_3 | {"GROUP_RANK": "2"}).node == 2
    assert read_environment(RANK_3 | {"RANK": "0"}).opens_store
    with_agent = {"RANK": "0", "TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    of_agent = read_environment(RANK_3 | with_agent)
    assert of_agent.by_torchrun and not of_agent.opens_store and not of_agent.origin
    again = {"TORCHELASTIC_RESTART_COUNT": "2"}
    assert read_environment(RANK_3 | with_agent | again).restart == 2
    # A store of rank 0 ends with it.
    assert read_environment(RANK_3 | again).restart == 0


@pytest.mark.parametrize(
    "left",
    [
        {},
        {"RANK": "3", "LOCAL_RANK": "x", "MASTER_ADDR": "gone", "MASTER_PORT": ""},
        RANK_3 | {"WORLD_SIZE": "1"},
    ],
)
def test_leftovers_do_no_harm_to_a_process_that_is_alone(left: dict[str, str]) -> None:
    where = read_environment(left)
    assert (where.rank, where.world_size, where.is_alone, where.opens_store) == (0, 1, True, False)
    assert speaks(left)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is '', .*must be a whole number of at least 1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE is '-2'"),
        ({"WORLD_SIZE": "²"}, "WORLD_SIZE is '²'"),
        ({"RANK": "8"}, "RANK is '8', with WORLD_SIZE='8': it must be a whole number within 0 to 7"),
        ({"RANK": ""}, "RANK is ''"),
        ({"RANK": "1.0"}, r"RANK is '1\.0'"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK is '2'"),
        ({"LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE is '9'"),
        ({"MASTER_PORT": "tcp"}, "MASTER_PORT is 'tcp'"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT is '65536'"),
        ({"MASTER_ADDR": " "}, "MASTER_ADDR is ' '"),
    ],
)
def test_a_wrong_variable_is_named_with_the_remedy(changed: dict[str, str], expected: str) -> None:
    with pytest.raises(ConfigError, match=f"{expected}.*unset RANK WORLD_SIZE"):
        read_environment(RANK_3 | changed)


@pytest.mark.parametrize("name", ["RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_a_missing_variable_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is not set"):
        read_environment({key: value for key, value in RANK_3.items() if key != name})


def test_counts_are_read_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert (number_of("LOCAL_WORLD_SIZE", 1), number_of("NO_SUCH_VARIABLE", 1)) == (4, 1)


def test_one_rank_speaks_for_all() -> None:
    assert speaks(RANK_3 | {"RANK": "0"}) and not speaks(RANK_3)


def test_a_wrong_number_of_processes_says_whose_the_variables_are() -> None:
    config = compose(["experiment=smoke", "parallelism=serial", "cluster.gpus_per_node=1"])
    with pytest.raises(
        ConfigError, match=r"8 process\(es\) started, .* may be another session's: `unset RANK"
    ):
        check_world_size(config, read_environment(RANK_3))
    with pytest.raises(ConfigError) as by_torchrun:
        check_world_size(config, read_environment(RANK_3 | {"TORCHELASTIC_RUN_ID": "x"}))
    assert "unset" not in str(by_torchrun.value)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("no-such-host.invalid", "the name 'no-such-host.invalid' does not resolve on"),
        # Set apart for documentation: no machine has it.
        ("192.0.2.1", r"192\.0\.2\.1 \(192\.0\.2\.1\) is not this machine"),
    ],
)
def test_a_stale_meeting_place_is_named_before_torch_is_loaded(
    address: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stale = RANK_3 | {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": address, "MASTER_PORT": str(free_port())}
    stale |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    for name, value in stale.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("k25_train.joining.network.CONNECT_S", 0.5)
    with pytest.raises(JoinError, match=f"MASTER_ADDR={address} .*{expected}.*unset RANK"):
        check_place(compose(["experiment=smoke"]))


def test_a_port_that_is_taken_is_named(monkeypatch: pytest.MonkeyPatch) -> None:

    with socket.create_server(("", 0)) as listener:
        port = str(listener.getsockname()[1])
        for name, value in (RANK_3 | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4"}).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", port)
        with pytest.raises(JoinError, match=f"port {port} of .* cannot be opened .*in use"):
            check_place(compose(["experiment=smoke"]))


def test_checks_of_the_place_need_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import k25_train.train, k25_train.joining.place"
    subprocess.run([sys.executable, "-c", code], cwd=REPO, env=os.environ, check=True)
