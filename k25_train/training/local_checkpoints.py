"""A run's checkpoints on its nodes' own disks: when they are written, and which one is read."""

import secrets
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, override

from k25_train.checkpoint import folders
from k25_train.checkpoint.agreement import gather_from_ranks, on_every_rank, on_first_rank
from k25_train.checkpoint.local.choice import choose
from k25_train.checkpoint.local.loading import load_local
from k25_train.checkpoint.local.saving import LocalPlace
from k25_train.checkpoint.local.store import LocalStore, Origin, identity_of, identity_of_run
from k25_train.checkpoint.records import Committed
from k25_train.checkpoint.storage.kinds import Place
from k25_train.config.schema import Config
from k25_train.joining.environment import read_environment
from k25_train.metrics.report import Report
from k25_train.training.cadence import SaveCadence
from k25_train.training.run import Run
from k25_train.training.soundness import Verdict


class NoLocalCheckpoints:
    """A run without `checkpoint.local_dir`."""

    time_is_up = False
    """Whether the interval has passed by the clock that counts."""
    why_ruined = ""
    """Why the state of the save in progress is not sound after all."""

    def find(self, shared: Place | None) -> Place | None:
        """The checkpoint on the nodes' disks that all ranks go on from; None for the shared one."""
        return None

    def load(self, folder: Place) -> str:
        """Load it. Returns why that cannot be done; then the state has to be loaded from elsewhere."""
        raise AssertionError("there is none")

    def is_due(self, step: int, verdict: Verdict, *, time_is_up: bool, is_free: bool) -> bool:
        """Whether to save now; what is due while another save is in progress waits until `is_free`."""
        return False

    def shared_is_begun(self) -> None:
        """A shared checkpoint is written: the interval counts from now on."""

    def place(self, shared: Place | None) -> LocalPlace:
        """Where the next save goes; `shared` is the newest shared checkpoint."""
        raise AssertionError("there is none")

    def committed(self, step: int, found: Committed) -> None:
        """Take note of a save that has come to its end."""

    def learn(self, verdict: Verdict) -> None:
        """Draw conclusions from a step for the checkpoint whose weights it started from."""

    def forget(self) -> None:
        """Delete all of them, if that can be done: they are of no more use."""


class LocalCheckpoints(NoLocalCheckpoints):
    """Those of a run with `checkpoint.local_dir`. Every rank calls every method."""

    def __init__(self, run: Run, report: Report, local_dir: str) -> None:
        """Find out which ranks are on this node. Raises `CheckpointError` if the run has no id."""
        self._run, self._report = run, report
        run_id = on_first_rank(lambda: identity_of_run(run.folder))
        node = read_environment().node
        ranks = [rank for rank, other in enumerate(gather_from_ranks(lambda: node)) if other == node]
        self._store = LocalStore(local_dir, run_id, node, ranks)
        config = run.config.checkpoint
        self._cadence = SaveCadence(replace(config, interval=config.local_interval), has_clock=run.is_main)
        self._layout = layout_of_pieces(run.config)
        self._waits = False
        """Whether a save is due that could not be begun."""
        self._unproven = 0
        """Step of the newest one, until a sound step was taken from its weights; then 0."""
        self._is_awaited = False
        """Whether the next step is to say whether the weights of the save in progress are good."""

    @property
    @override
    def time_is_up(self) -> bool:  # type: ignore[override]
        return self._cadence.time_is_up

    @override
    def find(self, shared: Place | None) -> Place | None:
        rank = self._run.topology.rank
        # 1. What each node has that is whole and of this layout.
        found = gather_from_ranks(lambda: self._store.candidates(rank, self._layout))
        # Where the run ends, a shared one is what counts.
        last = self._run.config.train.steps
        by_rank = [[each for each in candidates if each.step < last] for candidates in found]
        # 2. One that all have, newer than the shared one, and written after that very one.
        step = folders.step_of(shared) if shared is not None else 0
        identity = on_first_rank(lambda: identity_of(shared))
        chosen = choose(by_rank, step, identity)
        if chosen.local is None:
            if chosen.why:
                self._report.notice(f"checkpoint.local_dir: {chosen.why}; going on from the shared one")
            return None
        folder = self._store.folder(chosen.local)
        self._report.notice(f"{folder}, and its like on every node: {chosen.why}; going on from there")
        return folder

    @override
    def load(self, folder: Place) -> str:
        run = self._run
        why = load_local(Path(str(folder)), run.topology.rank, run.modules, run.optimizer)
        if not why:
            self._unproven = folders.step_of(folder)
        return why

    @override
    def is_due(self, step: int, verdict: Verdict, *, time_is_up: bool, is_free: bool) -> bool:
        is_due = self._cadence.is_due(step, verdict, time_is_up=time_is_up) or self._waits
        self._waits = is_due and not (is_free and verdict.is_sound)
        return is_due and not self._waits

    @override
    def shared_is_begun(self) -> None:
        self._cadence.restart()
        self._waits = False

    @override
    def place(self, shared: Place | None) -> LocalPlace:
        self._cadence.restart()
        self.why_ruined = ""
        self._is_awaited = True
        save, after = on_first_rank(lambda: (secrets.token_hex(8), identity_of(shared)))
        origin = Origin(save=save, after=after, layout=self._layout, ranks=self._store.ranks)
        return LocalPlace(self._store, origin)

    @override
    def committed(self, step: int, found: Committed) -> None:
        is_awaited, self._is_awaited = self._is_awaited, False
        if found.why_unsound:
            self._report.notice(f"step {step} is not kept on the nodes' disks: {found.why_unsound}")
        elif self.why_ruined:
            self._drop(step)
        elif is_awaited:
            self._unproven = step

    @override
    def learn(self, verdict: Verdict) -> None:
        ruined = verdict.weights_were_ruined
        if self._is_awaited:
            self._is_awaited = False
            self.why_ruined = f"the next step showed that its weights are bad: {verdict.why_unsound}" * ruined
        elif self._unproven:
            step, self._unproven = self._unproven, 0
            if ruined:
                self._drop(step)

    @override
    def forget(self) -> None:
        self._change(self._store.forget_all)

    def _drop(self, step: int) -> None:
        self._report.notice(f"step {step} is dropped from the nodes' disks: its weights are bad")
        self._change(lambda: self._store.forget([step]))

    def _change(self, action: Any) -> None:
        """Have each node's first rank do something to its folder; a disk that refuses costs room alone."""

        def attempt() -> None:
            try:
                if self._run.topology.rank == self._store.ranks[0]:
                    action()
            except OSError as error:
                print(f"{self._store.root}: could not be tidied up ({error})", flush=True)

        on_every_rank(attempt)


def build_local_checkpoints(run: Run, report: Report) -> NoLocalCheckpoints:
    """Those that the configuration asks for."""
    local_dir = run.config.checkpoint.local_dir
    return NoLocalCheckpoints() if local_dir is None else LocalCheckpoints(run, report, local_dir)


def layout_of_pieces(config: Config) -> Mapping[str, Any]:
    """What decides which ranges of which tensors a rank holds."""
    parallelism = config.parallelism
    return {
        "pp": parallelism.pp,
        "vpp": parallelism.vpp,
        "ep": parallelism.ep,
        "stages": parallelism.layout,
        "world_size": config.world_size,
        "dep": config.dep.mode.value,
        "trained": sorted(part.value for part in config.optim.trained),
    }
