"""Faults of a recorded node: what is broken, and what the one finding on it must say."""

from collections.abc import Callable
from dataclasses import dataclass

from k25_train.config.schema import Config
from launch.preflight.findings import Verdict
from tests.helpers.recorded_node import RecordedNode, examine


@dataclass(frozen=True)
class Fault:
    """Something wrong with a node, and what the finding must say."""

    name: str
    do: Callable[[RecordedNode], object]
    check: str
    verdict: Verdict
    words: tuple[str, ...]
    meanwhile: Callable[[RecordedNode], object] = lambda node: None
    """What happens to the node while it measures."""


def gpu(index: int, **fields: str) -> Callable[[RecordedNode], object]:
    """A function that changes fields of a GPU; `__` in a name is a dot."""
    return lambda node: node.gpus[index].update(
        {key.replace("__", "."): value for key, value in fields.items()}
    )


def write(path: str, text: str) -> Callable[[RecordedNode], object]:
    """A function that makes a file, or changes it."""
    return lambda node: node.write(path, text)


def says(start: str, error: Exception) -> Callable[[RecordedNode], object]:
    """A function that makes a command fail."""
    return lambda node: node.outputs.update({start: error})


def set_value(name: str, value: int) -> Callable[[RecordedNode], object]:
    """A function that sets one of the node's numbers."""
    return lambda node: setattr(node, name, value)


BAD, SO_SO, SKIPPED = Verdict.failed, Verdict.warned, Verdict.skipped


def assert_named(fault: Fault, recorded: RecordedNode, config: Config) -> None:
    """Plant the fault: one check names it, with its verdict, rule and remedy, and no other check objects."""
    fault.do(recorded)
    findings = [
        finding
        for finding in examine(recorded, config, lambda: fault.meanwhile(recorded))
        if finding.verdict is not Verdict.passed
    ]
    texts = "\n".join(map(str, findings))
    bad = [finding for finding in findings if finding.check == fault.check]
    assert bad, texts
    assert bad[0].verdict is fault.verdict, texts
    for word in fault.words:
        assert word in str(bad[0])
    if bad[0].verdict is not Verdict.skipped:
        assert bad[0].rule
        assert bad[0].remedy
    # One fault, one check: a second bad one would send people after what is not broken.
    assert {finding.check for finding in findings if finding.verdict is not Verdict.skipped} <= {
        fault.check
    }, texts
