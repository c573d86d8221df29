"""Faults of a recorded node: what is broken, and what the one finding on it must say."""

from collections.abc import Callable
from dataclasses import dataclass

from k25_train.config.schema import Config
from launch.preflight.findings import Finding, Verdict
from tests.helpers.recorded_node import RecordedNode, examine

Change = Callable[[RecordedNode], object]
"""Makes a fault."""


@dataclass(frozen=True)
class Fault:
    """Something wrong with a node, and what the finding must say."""

    name: str
    do: Change
    check: str
    verdict: Verdict
    words: tuple[str, ...]
    meanwhile: Change = lambda node: None
    """What happens to the node while it measures."""


def gpu(index: int, **fields: str) -> Change:
    """A function that changes fields of a GPU; `__` in a name is a dot."""
    return lambda node: node.gpus[index].update(
        {key.replace("__", "."): value for key, value in fields.items()}
    )


def write(path: str, text: str) -> Change:
    """A function that makes a file, or changes it."""
    return lambda node: node.write(path, text)


def says(start: str, output: str | Exception) -> Change:
    """A function that makes commands that start so print something else, or fail."""
    return lambda node: node.outputs.update({start: output})


def set_value(name: str, value: int) -> Change:
    """A function that sets one of the node's numbers."""
    return lambda node: setattr(node, name, value)


def adds(start: str, *lines: str) -> Change:
    """A function that adds lines to what a command prints."""

    def change(node: RecordedNode) -> None:
        node.outputs[start] = "\n".join([str(node.outputs[start]).rstrip("\n"), *lines, ""])

    return change


def in_gpu(start: str, number: int, old: str, new: str) -> Change:
    """A function that changes, in a command's output, the first line with `old` after a GPU's heading."""

    def change(node: RecordedNode) -> None:
        lines = str(node.outputs[start]).splitlines()
        headings = [at for at, line in enumerate(lines) if line.startswith("GPU ")]
        place = next(at for at in range(headings[number], len(lines)) if old in lines[at])
        assert number + 1 == len(headings) or place < headings[number + 1]
        lines[place] = lines[place].replace(old, new)
        node.outputs[start] = "\n".join(lines) + "\n"

    return change


def in_log(number: int, name: str, value: str) -> Change:
    """A function that changes the first value of this name in what `nvidia-smi -q` says of a GPU."""

    def change(node: RecordedNode) -> None:
        lines = (line.strip() for line in str(node.outputs["nvidia-smi -q"]).splitlines())
        old = next(line for line in lines if line.startswith(f"{name} ") and " : " in line)
        in_gpu("nvidia-smi -q", number, old, f"{name:<37} : {value}")(node)

    return change


def both(*changes: Change) -> Change:
    """A function that makes all of the changes."""

    def change(node: RecordedNode) -> None:
        for one in changes:
            one(node)

    return change


BAD, SO_SO, SKIPPED, PASSED = Verdict.failed, Verdict.warned, Verdict.skipped, Verdict.passed


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


def found_by(check: str, recorded: RecordedNode, config: Config) -> Finding:
    """The only finding of a check."""
    (own,) = [one for one in examine(recorded, config) if one.check == check]
    return own
