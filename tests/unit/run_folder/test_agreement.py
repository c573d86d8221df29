"""What ranks disagree about, and which nodes do not see what others see."""

from k25_train.run_folder.agreement import Statement, disagreement, not_shared, some

REMEDIES = {"run.dir": "share it", "versions": "install them"}


def statements(*facts: tuple[str, str]) -> list[Statement]:
    """Of ranks on nodes of two ranks: run.dir and versions."""
    return [
        Statement(
            rank=rank, node=rank // 2, host=f"h{rank // 2}", facts={"run.dir": run, "versions": versions}
        )
        for rank, (run, versions) in enumerate(facts)
    ]


def test_ranks_that_agree() -> None:
    assert disagreement(statements(*[("/r", "1")] * 4096), REMEDIES) is None
    assert disagreement([], REMEDIES) is None


def test_each_difference_is_told_with_its_nodes() -> None:
    said = statements(("/r", "1"), ("/r", "1"), ("/q", "1"), ("/q", "2"))
    assert disagreement(said, REMEDIES) == (
        "the ranks are not of one job\n"
        "  run.dir has to be the same on all ranks:\n"
        "    /r on node 0 (h0)\n"
        "    /q on node 1 (h1)\n"
        "    -> share it\n"
        "  versions has to be the same on all ranks:\n"
        "    1 on node 0 (h0), node 1 (h1)\n"
        "    2 on node 1 (h1)\n"
        "    -> install them"
    )


def test_of_many_nodes_a_few_are_named() -> None:
    said = statements(*[("/r", "1")] * 2, *[("/q", "1")] * 4094)
    text = disagreement(said, REMEDIES)
    assert (
        text is not None and "/q on node 1 (h1), node 2 (h2), node 3 (h3), node 4 (h4) and 2043 more" in text
    )
    assert some(["a", "b", "a"]) == "a, b"


def test_a_rank_that_does_not_know_a_fact_differs() -> None:
    """As one of an earlier version of the code."""
    said = [*statements(("/r", "1")), Statement(rank=1, node=1, host="h1", facts={"run.dir": "/r"})]
    assert "unknown on node 1 (h1)" in str(disagreement(said, REMEDIES))


def test_a_folder_that_is_not_shared_names_the_nodes() -> None:
    text = not_shared("/r", {"does not see it": ["node 1 (h1)", "node 1 (h1)", "node 2 (h2)"]})
    assert text.startswith(
        "run.dir=/r is not one folder that all nodes share:\n  node 1 (h1), node 2 (h2): does"
    )
