"""What follows from the end of an attempt: who is to blame, which nodes and checkpoint to do without.

The decisions are those of `blame` and `recurrence`; here they are put into effect and into words.
"""

import dataclasses
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from launch.attempts import Attempts
from launch.blame.judge import judge
from launch.blame.verdict import Kind, Verdict
from launch.history import Attempt, Outcome
from launch.output import log
from launch.recurrence import may_pass_over, suspects
from launch.restart_policy import choose_nodes
from launch.submission import Submission
from launch.witnesses import collect

DAMAGED = ".damaged"
"""What a checkpoint that does not load is called after its name; no run resumes from it or deletes it."""
_STEP = re.compile(r"step_\d+")


class Aftermath:
    """Draws conclusions for one run."""

    def __init__(self, submission: Submission, attempts: Attempts) -> None:
        self.submission = submission
        self.attempts = attempts

    def judged(
        self, ended: Attempt, history: Sequence[Attempt], lost: Mapping[str, str], silent_start: str
    ) -> Attempt:
        """The record of an attempt with who ended it; a checkpoint that did not load is set aside.

        Args:
            ended: the record, with its outcome.
            history: the job's earlier attempts.
            lost: node -> SLURM's state, of its nodes that are no longer usable.
            silent_start: the node that could not tell where ranks meet; empty if none.
        """
        if ended.outcome not in (Outcome.failed, Outcome.node_lost):
            return ended
        verdict = judge(collect(self.attempts, ended, self.submission.ranks_per_node, lost, silent_start))
        ended = dataclasses.replace(ended, blame=verdict)
        log(f"attempt {ended.number}: {described(verdict)}")
        if verdict.kind == Kind.checkpoint and may_pass_over([*history, ended]):
            ended = dataclasses.replace(ended, passed_over=self._pass_over(verdict))
        return ended

    def _pass_over(self, verdict: Verdict) -> str:
        """Set the checkpoint aside, if there is another to go on from; its old name, empty if it stays."""
        damaged, root = Path(verdict.checkpoint), Path(self.submission.run) / "checkpoints"
        if not verdict.instead or damaged.parent != root or not _STEP.fullmatch(damaged.name):
            return ""
        try:
            target = set_aside(damaged)
        except OSError as error:
            log(f"{damaged} does not load, and could not be set aside ({error})")
            return ""
        log(
            f"{damaged.name} does not load and is passed over, once, for {Path(verdict.instead).name}; it is "
            f"kept as {target}"
        )
        return damaged.name

    def in_words(
        self,
        ended: Attempt,
        *,
        status: int,
        last_step: int | None,
        lost: Mapping[str, str],
        requested_by: str,
    ) -> str:
        """How an attempt ended.

        Args:
            ended: the record, with its outcome and who is to blame.
            status: srun's exit status.
            last_step: of the metrics.
            lost: node -> SLURM's state, of its nodes that are no longer usable.
            requested_by: the signal that asked it to stop, if one did.
        """
        where = f"at step {last_step} of {self.submission.num_steps}"
        if ended.outcome == Outcome.unfit:
            return "preflight failed on " + ", ".join(f"{node} ({why})" for node, why in ended.unfit.items())
        if ended.outcome == Outcome.no_room:
            return f"{where}: {ended.reason}"
        if ended.outcome == Outcome.node_lost:
            return f"{where}, as {', '.join(f'{node} is {state}' for node, state in lost.items())}"
        if ended.outcome == Outcome.stopped:
            return f"{where}, requested by {requested_by}"
        if ended.outcome == Outcome.failed:
            blame = ended.blame or Verdict()
            logs = "srun.log" if blame.node is None else f"node_{blame.node}.log"
            logs = logs if blame.rank is None else f"rank_{blame.rank}.log and {logs}"
            if self.submission.preflight and not self.attempts.has_report(ended):
                logs = "preflight.log and preflight_srun.log"
            return f"{where}, srun ended with status {status}: {blame.reason}; see {logs}"
        return where

    def without(
        self, history: Sequence[Attempt], nodes: Sequence[str], sound: Collection[str]
    ) -> dict[str, str]:
        """Node -> why, of those to blame that the next attempt does without; logs it, also where it cannot.

        Args:
            history: the job's attempts.
            nodes: those of the next attempt.
            sound: those of the job that SLURM and preflight have nothing against.
        """
        suspected, chosen = suspects(history), set(nodes)
        for node, why in suspected.items():
            if node in chosen:
                log(f"{node} is used again, since the run cannot go on without it, though {why}")
        left_out = {node: why for node, why in suspected.items() if node in sound and node not in chosen}
        for node, why in left_out.items():
            log(f"{node} is left out: {why}")
        return left_out

    def avoidable(self, allocated: Sequence[str], unusable: Iterable[str]) -> set[str]:
        """Nodes without each of which the run could go on."""
        unusable, legal = set(unusable), self.submission.legal_nodes
        return {node for node in allocated if choose_nodes(allocated, {*unusable, node}, legal)}


def described(verdict: Verdict) -> str:
    """A verdict in a line of the log."""
    if verdict.node is None:
        return f"no node is to blame ({verdict.kind}): {verdict.reason}"
    rank = "" if verdict.rank is None else f", rank {verdict.rank}"
    return (
        f"{verdict.node}{rank} is to blame ({verdict.kind}, {verdict.confidence} evidence): {verdict.reason}"
    )


def set_aside(damaged: Path) -> Path:
    """Give a checkpoint a name under which no run looks for it, and return that. Raises OSError."""
    target, number = damaged.with_name(damaged.name + DAMAGED), 1
    while os.path.lexists(target):
        number += 1
        target = damaged.with_name(f"{damaged.name}{DAMAGED}.{number}")
    os.rename(damaged, target)
    return target
