"""What ranks disagree about: the fact, its values, and where they are."""

import time
from collections.abc import Mapping, Sequence

import pytest

from k25_train.joining import agreement
from k25_train.joining.agreement import Facts, Kind, Statement, describe, differences, digest, to_ask

SETTINGS = Kind("configuration", "give all the same")
CODE = Kind("code", "use one checkout", per_node=True)
KINDS = (SETTINGS, CODE)
SOUND = {"configuration": {"optim.lr": "0.001", "train.seed": "1"}, "code": {"a.py": "11", "b.py": "22"}}


def job(
    num_ranks: int, odd: Mapping[int, Facts], per_node: int = 2
) -> tuple[list[Statement], dict[int, Facts]]:
    """What the ranks of a job state, and the facts of each; those in `odd` differ from `SOUND`."""
    facts = {rank: {**SOUND, **odd.get(rank, {})} for rank in range(num_ranks)}
    statements = []
    for rank, own in facts.items():
        known = {kind: digest(own[kind]) for kind in own if rank % per_node == 0 or kind != CODE.name}
        node = rank // per_node
        statements.append(
            Statement(rank=rank, node=node, host=f"h{node}", local_rank=rank % per_node, digests=known)
        )
    return statements, facts


def told(statements: Sequence[Statement], facts: Mapping[int, Facts]) -> list[str]:
    """The lines of the error, from the values of the ranks that are asked alone."""
    asked = to_ask(statements, KINDS)
    values = {rank: {kind: facts[rank][kind] for kind in asked} for ranks in asked.values() for rank in ranks}
    found = differences(statements, values, KINDS)
    return describe(found, statements).splitlines() if found else []


def settings(**changed: str) -> Facts:
    """Other settings."""
    named = {key.replace("__", "."): value for key, value in changed.items()}
    return {"configuration": {**SOUND["configuration"], **named}}


def files(**changed: str) -> Facts:
    """Other code."""
    return {"code": {**SOUND["code"], **{f"{name}.py": value for name, value in changed.items()}}}


@pytest.mark.parametrize(
    ("num_ranks", "odd", "lines"),
    [
        # One node of two, of one rank more, and of many; a rank of a node; several keys.
        (
            4,
            dict.fromkeys((2, 3), settings(optim__lr="0.002")),
            ["optim.lr: 0.001 on node 0 (host h0, ranks 0-1), 0.002 on node 1 (host h1, ranks 2-3)"],
        ),
        (
            4,
            {3: settings(optim__lr="0.002")},
            ["optim.lr: 0.001 on node 0 (host h0, ranks 0-1) and rank 2 of node 1 (host h1), "
             "0.002 on rank 3 of node 1 (host h1)"],
        ),
        (
            8,
            dict.fromkeys((0, 1), settings(optim__lr="0.002")),
            ["optim.lr: 0.001 on nodes 1 to 3 (hosts h1, h2, h3), 0.002 on node 0 (host h0, ranks 0-1)"],
        ),
        (
            64,
            dict.fromkeys((2, 3, 6, 7, *range(10, 64)), settings(train__seed="7")),
            ["train.seed: 7 on nodes 1, 3 and 5 to 31 (hosts h1, h3, h5 and 26 more), "
             "1 on nodes 0, 2 and 4 (hosts h0, h2, h4)"],
        ),
        (
            6,
            {rank: settings(optim__lr=str(1 + rank // 2)) for rank in (2, 3, 4, 5)},
            ["optim.lr: 0.001 on node 0 (host h0, ranks 0-1), 2 on node 1 (host h1, ranks 2-3), "
             "3 on node 2 (host h2, ranks 4-5)"],
        ),
        # A key that one has in addition, or lacks.
        (
            4,
            dict.fromkeys((2, 3), settings(new="1")),
            ["new: not set on node 0 (host h0, ranks 0-1), 1 on node 1 (host h1, ranks 2-3)"],
        ),
        # The first rank of a node speaks for it.
        (
            8,
            {4: files(b="33")},
            ["b.py: 22 on nodes 0, 1 and 3 (hosts h0, h1, h3), 33 on node 2 (host h2, ranks 4-5)"],
        ),
        (
            4,
            {2: files(c="44")},
            ["c.py: not set on node 0 (host h0, ranks 0-1), 44 on node 1 (host h1, ranks 2-3)"],
        ),
        # Two nodes with one learning rate and different seeds are one group as far as the rate goes.
        (
            6,
            {rank: settings(optim__lr="2", train__seed=str(rank // 2)) for rank in (2, 3, 4, 5)},
            ["optim.lr: 2 on nodes 1 and 2 (hosts h1, h2), 0.001 on node 0 (host h0, ranks 0-1)",
             "train.seed: 1 on nodes 0 and 1 (hosts h0, h1), 2 on node 2 (host h2, ranks 4-5)"],
        ),
    ],
)  # fmt: skip
def test_each_difference_is_told_with_its_nodes(
    num_ranks: int, odd: Mapping[int, Facts], lines: list[str]
) -> None:
    kind = next(kind for kind in KINDS if kind.name in next(iter(odd.values())))
    head = ["the ranks are not of one job", f"  {kind.name}: has to be the same on all ranks"]
    assert told(*job(num_ranks, odd)) == [*head, *(f"    {line}" for line in lines), f"    -> {kind.remedy}"]


def test_who_agrees_is_not_asked() -> None:
    statements, facts = job(64, {})
    assert to_ask(statements, KINDS) == {} and told(statements, facts) == []
    statements, _ = job(64, {5: settings(optim__lr="2"), 9: settings(optim__lr="2")})
    assert to_ask(statements, KINDS) == {"configuration": [0, 5]}
    assert to_ask([], KINDS) == {}


def test_what_most_ranks_have_is_always_asked_for() -> None:
    """Wherever they are in the job."""
    statements, _ = job(64, {rank: settings(optim__lr=str(rank)) for rank in range(20)})
    assert to_ask(statements, KINDS)["configuration"] == [20, *range(agreement.MAX_GROUPS - 1)]


def test_all_kinds_are_told_at_once() -> None:
    lines = told(*job(4, {2: {**settings(optim__lr="2"), **files(a="9")}}))
    assert [line.strip() for line in lines if "has to be" in line] == [
        f"{kind.name}: has to be the same on all ranks" for kind in KINDS
    ]


def test_values_of_all_ranks_apart() -> None:
    """A job has thousands of ranks; some are asked, and an error has some lines."""
    statements, facts = job(64, {rank: settings(optim__lr=str(rank)) for rank in range(64)})
    assert len(to_ask(statements, KINDS)["configuration"]) == agreement.MAX_GROUPS
    (line,) = [line for line in told(statements, facts) if "optim.lr" in line]
    assert line.strip().startswith("optim.lr: other values on ") and line.count(" on ") == 9
    many = {f"k{number}": "1" for number in range(100)}
    lines = told(*job(4, {2: settings(**many), 3: settings(**many)}))
    assert len(lines) == agreement.MAX_FACTS + 4 and lines[-2].strip() == "and 88 more"
    (line,) = [line for line in told(*job(2, {1: settings(train__seed="7" * 5000)})) if "seed" in line]
    assert len(line) < 400 and "777…" in line


def test_a_rank_of_another_version_differs() -> None:
    """It states nothing of a kind that it does not know, or does not answer."""
    statements, facts = job(4, {})
    silent = [*statements[:2], *(Statement(rank=n, node=1, host="h1", local_rank=n - 2) for n in (2, 3))]
    lines = told(silent, {**facts, 2: {"configuration": {}, "code": {}}})
    assert any("optim.lr: 0.001 on node 0" in line and "not set on node 1" in line for line in lines)
    found = differences(silent, {0: facts[0]}, KINDS)
    assert "differs between node 0 (host h0, ranks 0-1); node 1" in describe(found, silent)


def test_thousands_of_ranks_are_compared_in_a_moment() -> None:
    odd = dict.fromkeys((777, 778), settings(optim__lr="2"))
    statements, facts = job(4096, odd, per_node=8)
    start_s = time.perf_counter()
    lines = told(statements, facts)
    assert time.perf_counter() - start_s < 5.0
    assert "0.001 on nodes 0 to 96 and 98 to 511 (hosts h0, h1, h2 and 508 more) and ranks 776" in lines[2]
