"""What nodes must have alike: names that lead to the same place, parts; and what a token dispatcher needs."""

from dataclasses import replace

from k25_train.config.schema import Config
from launch.preflight.names import Names, judge_names, read_names
from launch.preflight.node import read_node
from launch.preflight.traits import judge_traits
from tests.helpers.node_faults import BAD, PASSED, SKIPPED, SO_SO, in_gpu
from tests.helpers.recorded_node import RecordedNode


def names(host: str, own: str, first: str = "10.0.0.10", reverse: str | None = None) -> Names:
    """What a node resolves; the first node is called node-0."""
    return Names(
        host=host,
        addresses=(own,) if own else (),
        reverse=reverse,
        first="node-0",
        first_addresses=(first,) if first else (),
    )


def test_names_that_do_not_lead_where_they_should() -> None:
    found = judge_names(
        {
            "sound": names("node-0", "10.0.0.10", reverse="node-0.example.org"),
            "no reverse": names("node-1", "10.0.0.11"),
            "another first": names("node-2", "10.0.0.12", first="10.9.9.9"),
            "unknown first": names("node-3", "10.0.0.13", first=""),
            "wrong back": names("node-4", "10.0.0.14", reverse="node-9"),
            "shared": names("node-5", "10.0.0.11"),
            "loopback": names("node-6", ""),
            "same host": names("node-0", "10.0.0.10"),
        }
    )
    verdicts = {node: one.verdict for node, one in found.items()}
    assert verdicts == {
        "sound": PASSED, "no reverse": SO_SO, "another first": BAD, "unknown first": BAD,
        "wrong back": SO_SO, "shared": SO_SO, "loopback": SKIPPED, "same host": PASSED,
    }  # fmt: skip
    assert "node-0 is 10.9.9.9" in found["another first"].found and "10.0.0.10" in found["another first"].rule
    assert "node-4 is 10.0.0.14, which is node-9" in found["wrong back"].found
    assert "and so is node-1" in found["shared"].found
    assert judge_names({"alone": names("node-0", "10.0.0.10")})["alone"].verdict is SKIPPED


def test_names_of_a_sound_site_are_sound() -> None:
    """The first node knows itself from /etc/hosts or by all of its addresses; not all nodes have IPv6."""
    itself = names("node-0", "10.0.0.10", first="127.0.1.1")
    other = names("node-1", "10.0.0.11")
    both = replace(names("node-2", "10.0.0.12"), first_addresses=("10.0.0.10", "fd00::10"))
    for own in (itself, replace(itself, first_addresses=("10.0.0.10", "172.17.0.1", "fe80::1%eth0"))):
        for nodes in ([own, other], [own, other, both], [own, both]):
            found = judge_names({one.host: one for one in nodes})
            assert {one.verdict for one in found.values()} == {PASSED}, found
    lost = judge_names({"a": replace(itself, first_addresses=()), "b": other})
    assert lost["a"].verdict is BAD and lost["b"].verdict is PASSED


def test_only_names_are_resolved(recorded: RecordedNode) -> None:
    """launch.slurm gives the first node's address, which needs no name."""
    recorded.environment["MASTER_ADDR"] = "10.0.0.10"
    assert read_names(recorded.system).first == ""
    recorded.environment["MASTER_ADDR"] = "node-0"
    assert read_names(recorded.system).first_addresses == ("10.0.0.10",)
    recorded.known_names["node-1"] = ["127.0.1.1"]
    assert read_names(recorded.system).addresses == ()


def test_a_node_of_other_parts(recorded: RecordedNode, config: Config) -> None:
    sound = read_node(recorded.system, "a", config).traits
    assert set(sound) == {"CPUs", "memory", "GPUs", "GPU memory", "GPU power cap", "GPU clock", "NVLinks"}
    in_gpu("nvidia-smi nvlink --status", 0, "26.562 GB/s", "<inactive>")(recorded)
    odd = read_node(recorded.system, "b", config).traits
    found = judge_traits(
        {"a": sound, "b": odd, "c": sound, "d": sound | {"memory": "about 992 GiB"}, "e": {}}
    )
    assert [found[node].verdict for node in "abcde"] == [PASSED, BAD, PASSED, SO_SO, SKIPPED]
    assert found["b"].found == "NVLinks 7 and 8" and found["b"].rule == "most nodes have NVLinks 8"
