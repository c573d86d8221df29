"""Reinforcement learning, on one page: roll out, judge, train, push.

    before a step   roll out ─► judge ─► budgets ─► advantages ─► the step's file      first rank
    the step        every rank reads its share of the file and trains, as in any run   all ranks
    after it        weights ─► engines ─► probe                                        all ranks

What a step is made of is on disk before it is trained, and what an engine has answered soon after it did. So
a run that is killed anywhere goes on as if nothing had been: steps that have their file are trained again
from it, and open groups go on from the journal.
"""

from contextlib import ExitStack

from k25_train.rl.first_rank import FirstRank
from k25_train.rl.probe import Probe
from k25_train.rl.room import Room
from k25_train.rl.weight_sync import WeightSync
from k25_train.run_folder.rows_file import Value
from k25_train.training.run import Run
from k25_train.training.step import StepResult

POLICY = "policy/"
"""What figures of the policy begin with: masked tokens, and how far engine and trainer are apart."""


async def roll_out(room: Room, step: int) -> None:
    """Have everything on disk that `step` trains on, and with it the other steps of its phase."""
    if room.files.has(step):
        return
    # 1. Once in a run: from how long its correct responses are, the budgets of problems are estimated.
    if not room.toggle.is_estimated:
        room.toggle.estimate(await room.start_pass())

    # 2. Groups of K responses to a prompt, each with a verdict, in the order of tasks.
    groups = await room.controller.take(step, room.toggle)

    # 3. Rewards as the budgets have them, and advantages: the rewards less the group's mean.
    shares = room.shares(groups)
    rows = [room.weighted(step + number, share) for number, share in enumerate(shares)]

    # 4. A file for each step, of nothing that the journal has not. The first is written last: once it is
    #    there, the phase is.
    room.journal.flush()
    for number in reversed(range(len(shares))):
        room.write(step + number, shares[number], rows[number])
    room.consumed(step, shares)


class Reinforcement:
    """What happens around the steps of a run (`training/hooks.py`). Every rank calls every method."""

    def __init__(self, run: Run, room: Room | None, sync: WeightSync, probe: Probe) -> None:
        """`room`: what the first rank has, engines, judges and the journal; None on others."""
        assert run.config.algorithm is not None, "a run of reinforcement learning"
        self.run = run
        self.room = room
        self.sync = sync
        self.probe = probe
        self.first_rank = FirstRank(run, room)
        self.steps_per_rollout = run.config.algorithm.steps_per_rollout

    def resumed(self, step: int) -> None:
        """Go on behind `step`. Whatever weights engines have, they get the run's before they generate."""
        self.first_rank.does("open the journal", lambda room: room.begin(step))
        self.push(step)

    def before(self, step: int) -> None:
        """Roll out what the step trains on, unless an earlier job did."""
        self.first_rank.does("roll out", lambda room: roll_out(room, step))

    def after(self, step: int, result: StepResult) -> dict[str, Value]:
        """Push the weights once the rollouts of a phase are used up; what the row says of rollouts."""
        figures = self.push(step) if step % self.steps_per_rollout == 0 else {}
        figures |= {name: value for name, value in result.figures.items() if name.startswith(POLICY)}
        return figures | self.first_rank.does("tell of rollouts", lambda room: room.figures(step))

    def evaluate(self, step: int) -> dict[str, float]:
        """Held-out tasks, with the weights that the engines have."""
        return self.first_rank.does("evaluate rollouts", lambda room: room.evaluate(step))

    def push(self, version: int) -> dict[str, Value]:
        """Bring the engines to the weights that the run has now, and prove it; seconds and bytes."""
        pushed = self.sync.push(version)
        gap = self.probe.check()
        self.first_rank.does("admit groups", lambda room: room.pushed())
        return {
            "sync_s": pushed.sync_s,
            "sync_bytes": pushed.num_bytes,
            "probe_gap": gap.mean,
            "probe_gap_max": gap.largest,
            "probe_flipped": gap.flipped,
        }

    def close(self) -> None:
        """End engines and judges; the journal has all that was acknowledged."""
        with ExitStack() as rest:
            # Whatever becomes of engines, nothing stays in shared memory.
            rest.callback(self.probe.close)
            rest.callback(self.sync.close)
            if self.room is not None:
                self.room.end()
