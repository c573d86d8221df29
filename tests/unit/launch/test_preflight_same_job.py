"""Preflight names the node that would run something else, as the start of a run does."""

from collections.abc import Mapping

import pytest

from k25_train.joining.agreement import Facts, Kind, Statement, differences, digest
from k25_train.joining.facts import CODE, CONFIGURATION, DATA
from launch.preflight.findings import Verdict
from launch.preflight.same_job import UNREADABLE, judge_agreement

KINDS = (CONFIGURATION, CODE, DATA)
SOUND: Facts = {
    "configuration": {"optim.lr": "0.001"},
    "code": {"a.py": "11"},
    "data set": {"data.train.text": "12 samples"},
}


def verdicts(odd: Mapping[int, Facts], num_nodes: int = 4, silent: int | None = None) -> dict[str, list[str]]:
    """Kind -> verdict and text of each node of two ranks, some of whose ranks have other facts."""
    said, values = [], {}
    for rank in range(2 * num_nodes):
        values[rank] = {**SOUND, **odd.get(rank, {})}
        digests = {kind: digest(own) for kind, own in values[rank].items()}
        node = rank // 2
        if node != silent:
            said.append(
                Statement(rank=rank, node=node, host=f"h{node}", local_rank=rank % 2, digests=digests)
            )
    found = differences(said, values, KINDS)
    judged = judge_agreement(found, said, KINDS, values[0], range(0, 2 * num_nodes, 2))
    return {
        kind.name: [f"{judged[leader][index].verdict.name}: {judged[leader][index]}" for leader in judged]
        for index, kind in enumerate(KINDS)
    }


@pytest.mark.parametrize(
    ("odd", "kind", "node", "words"),
    [
        ({3: {"configuration": {"optim.lr": "9"}}}, CONFIGURATION, 1, "9 on rank 3 of node 1 (host h1)"),
        ({0: {"code": {"a.py": "99"}}}, CODE, 0, "a.py: 11 on nodes 1 to 3 (hosts h1, h2, h3), 99 on node 0"),
        ({6: {"data set": {"data.train.text": "9 samples"}}}, DATA, 3, "12 samples on nodes 0 to 2"),
        (
            {4: {"data set": {UNREADABLE: "/data: no such folder"}}},
            DATA,
            2,
            "/data: no such folder on node 2",
        ),
    ],
)
def test_the_node_that_differs_fails_alone(
    odd: Mapping[int, Facts], kind: Kind, node: int, words: str
) -> None:
    found = verdicts(odd)
    for other in KINDS:
        states = [text.partition(":")[0] for text in found[other.name]]
        assert states == ["failed" if n == node and other == kind else "passed" for n in range(4)]
    assert words in found[kind.name][node] and kind.remedy in found[kind.name][node]


def test_nodes_that_agree_pass() -> None:
    assert {text.partition(":")[0] for own in verdicts({}).values() for text in own} == {Verdict.passed.name}


def test_a_node_without_an_answer_is_not_called_sound() -> None:
    for own in verdicts({}, silent=2).values():
        assert own[2].startswith("skipped: ") and "did not answer" in own[2]


def test_data_that_no_node_can_read_are_not_called_the_same() -> None:
    """A login node may prepare them later."""
    unreadable = {"data set": {UNREADABLE: "/data: no such folder"}}
    found = verdicts(dict.fromkeys(range(8), unreadable))["data set"]
    assert all(text.startswith("skipped: ") and "/data: no such folder" in text for text in found)


def test_many_differences_are_counted() -> None:
    many = {"configuration": {f"key{number}": "1" for number in range(50)}}
    text = verdicts({2: many, 3: many})["configuration"][1]
    assert "; and 47 more" in text
