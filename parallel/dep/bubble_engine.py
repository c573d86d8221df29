"""One rank's part in a step whose tower runs in the pipeline's idle times (`dep.schedule=bubbles`).

    engine.start(work)              what has to be encoded before the pipeline starts
    engine.before_pass(num_done)    called whenever the rank may be about to wait, with the passes it has done
    engine.leaf(micro_batch)        the backbone takes the features of a micro-batch
    engine.finish()                 what is left when the pipeline is done

Tasks run at the places that the plan gives them, whatever time passes take; see `parallel.dep.program`.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from parallel.dep.engine import Engine, EngineSetup, VisionWork
from parallel.dep.feature_exchange import Posted
from parallel.dep.program import Program, Task
from parallel.dep.stats import VisionStats
from parallel.dep.vision_pass import BackwardInSteps, EncodeInSteps, LayeredEncoder


@dataclass(slots=True)
class _Step:
    """State of the step under way."""

    work: VisionWork
    program: Program
    own_parts: Sequence[Sequence[int]]
    """[micro-batch] -> parts that this rank encodes."""
    takes: Sequence[bool]
    """[micro-batch] -> whether this rank is the first stage of a replica that has items in it."""
    tasks: deque[tuple[int, Task]]
    """(position, task) that are still to be run, in order."""
    num_backward_tasks: int
    """That are still to be run."""
    sent_before: int
    """Bytes that the exchange had sent before the step."""
    stats: VisionStats = field(default_factory=VisionStats)
    num_done: int = -1
    """Passes that this rank has done; below 0 before it has begun."""
    encoding: dict[int, EncodeInSteps] = field(default_factory=dict)
    """Chunk -> its forward pass, begun."""
    going_back: dict[int, BackwardInSteps] = field(default_factory=dict)
    """Chunk -> its recomputation and backward, begun."""
    encoded: dict[int, Tensor] = field(default_factory=dict)
    """Part -> features [n, D] that are not posted yet."""
    num_features_posted: int = 0
    """Micro-batches whose features were posted, as far as this rank has a part in them."""
    features: dict[int, Posted[Tensor | None]] = field(default_factory=dict)
    """Micro-batch -> its features, which the first stage has not taken yet."""
    leaf_gradients: dict[int, Tensor] = field(default_factory=dict)
    """Micro-batch -> gradient [V, D] that is not posted yet."""
    num_gradients_posted: int = 0
    """Micro-batches whose gradients were posted."""
    gradients: dict[int, Posted[dict[int, Tensor]]] = field(default_factory=dict)
    """Micro-batch -> gradients of its features that this rank has encoded, and not used yet."""
    leaving: deque[Posted[dict[int, Tensor]]] = field(default_factory=deque)
    """Gradients that a first stage has sent, in order."""
    part_gradients: dict[int, Tensor] = field(default_factory=dict)
    """Part -> gradient [n, D] that has come and was not used yet."""
    unfinished: list[Posted[Any]] = field(default_factory=list)
    """Posted transfers that may be under way still, in order."""
    is_reduced: bool = False
    """Whether the reduction of the encoder's gradients was started."""

    def held_bytes(self) -> int:
        """Bytes of the features and gradients that this rank has, and the backbone has not."""
        transfers = {id(posted): posted.nbytes for posted in [*self.unfinished, *self.features.values()]}
        waiting = (self.encoded, self.leaf_gradients, self.part_gradients)
        return sum(transfers.values()) + sum(rows.nbytes for each in waiting for rows in each.values())


class BubbleEngine(Engine):
    """Runs the encoder of this rank between the passes of the pipeline."""

    def __init__(
        self, setup: EngineSetup, encoder: LayeredEncoder, *, after_backward: Callable[[], None]
    ) -> None:
        """
        Args:
            encoder: this rank's replica; its parameters collect gradients if it is trained.
            after_backward: called once in each step, when this rank's gradients of the encoder are complete.
        """
        super().__init__(setup)
        self._encoder = encoder
        self._after_backward = after_backward
        self._step: _Step | None = None

    def start(self, work: VisionWork) -> None:
        """Do what comes before the rank's first pass. Called by every rank."""
        assert work.program is not None, "the plan of a step in bubbles has a program"
        self._step = step = self._begin(work, work.program)
        self._stats = step.stats
        self._exchange.connect(work.transfers)
        self.before_pass(0)

    def _begin(self, work: VisionWork, program: Program) -> _Step:
        rank, replica = self._exchange.rank, self._exchange.replica
        own_parts: list[list[int]] = [[] for _ in work.transfers]
        for parts in work.plan.chunks[rank]:
            own_parts[work.micro_batch_of(parts[0])] += parts
        tasks = deque(
            (position, task) for position in sorted(program.tasks) for task in program.tasks[position]
        )
        step = _Step(
            work=work,
            program=program,
            own_parts=own_parts,
            takes=[any(receiver == replica for _, receiver in transfer) for transfer in work.transfers],
            tasks=tasks,
            num_backward_tasks=sum(not task.is_forward for _, task in tasks),
            sent_before=self._exchange.sent_bytes,
        )
        step.stats.num_patches = sum(chunk.pixels.shape[0] for chunk in work.chunks)
        return step

    def before_pass(self, num_done: int) -> None:
        """Do what comes before the pass that follows the first `num_done` ones of this rank."""
        step = self._running()
        if num_done <= step.num_done:
            return
        step.num_done = num_done
        self._post(step)
        while step.tasks and step.tasks[0][0] <= step.num_done:
            place, task = step.tasks.popleft()
            # Of the others nobody knows what they would have waited for anyway.
            is_exposed = self._exchange.replica is not None and place in (0, step.program.num_passes)
            with self._stopwatch.timed(*["exposed_s"] * is_exposed):
                self._run(step, task)
            self._post(step)
        is_late = step.num_done >= step.program.reduce_from
        if is_late and step.num_backward_tasks == 0 and not step.is_reduced:
            step.is_reduced = True
            self._after_backward()

    def leaf(self, micro_batch: int) -> Tensor | None:
        """See `Engine`."""
        step = self._running()
        if not step.takes[micro_batch]:
            return None
        assert micro_batch in step.features, "the plan has this rank's own share encoded by now"
        with self._stopwatch.timed("exchange_s", "exposed_s"):
            features = step.features.pop(micro_batch).wait()
        assert features is not None

        def collect(gradient: Tensor) -> None:
            # The features themselves are freed with their graph, the gradient when it has been sent.
            step.leaf_gradients[micro_batch] = gradient

        return self._make_leaf(features, collect)

    def finish(self) -> None:
        """Do what is left, and let go of pixels. Called by every rank when its passes are done."""
        step = self._running()
        self.before_pass(step.program.num_passes)
        assert not step.tasks
        with self._stopwatch.timed("exchange_s"):
            for posted in step.unfinished:
                posted.finish()
        step.stats.sent_bytes = self._exchange.sent_bytes - step.sent_before
        self._step = None

    def _running(self) -> _Step:
        assert self._step is not None, "start comes first"
        return self._step

    def _run(self, step: _Step, task: Task) -> None:
        """Run one task; the first one of a backward pass may wait for its gradients."""
        chunk, parts = step.work.chunks[task.chunk], step.work.plan.chunks[self._exchange.rank][task.chunk]
        if task.is_forward:
            with self._phase("vision forward"), self._stopwatch.timed("forward_s"):
                if task.chunk not in step.encoding:
                    step.encoding[task.chunk] = EncodeInSteps(self._encoder, chunk, self._device)
                features = step.encoding[task.chunk].advance(task.num_steps)
            if features is not None:
                del step.encoding[task.chunk]
                sizes = [step.work.plan.parts[part].num_tokens for part in parts]
                step.encoded |= zip(parts, features.split(sizes), strict=True)
            return
        with self._phase("vision backward"):
            is_new = task.chunk not in step.going_back
            gradient = self._gradient(step, parts) if is_new else None
            with self._stopwatch.timed("backward_s"):
                if gradient is not None:
                    step.going_back[task.chunk] = BackwardInSteps(self._encoder, chunk, gradient)
                if step.going_back[task.chunk].advance(task.num_steps):
                    del step.going_back[task.chunk]
        step.num_backward_tasks -= 1

    def _gradient(self, step: _Step, parts: Sequence[int]) -> Tensor:
        """The gradient [n, D] of a chunk's features."""
        micro_batch = step.work.micro_batch_of(parts[0])
        if micro_batch in step.gradients:
            with self._stopwatch.timed("exchange_s"):
                step.part_gradients |= step.gradients.pop(micro_batch).wait()
        return torch.cat([step.part_gradients.pop(part) for part in parts])

    def _post(self, step: _Step) -> None:
        """Post the transfers whose turn has come."""
        step.unfinished = [posted for posted in step.unfinished if not posted.is_done()]
        self._post_features(step)
        if self._is_trained:
            self._post_gradients(step)
        step.stats.peak_feature_bytes = max(step.stats.peak_feature_bytes, step.held_bytes())

    def _post_features(self, step: _Step) -> None:
        """In the order of micro-batches, once the rank's own are encoded and, on a first stage, it is ready
        to receive."""
        for number in range(step.num_features_posted, step.work.num_micro_batches):
            parts, takes = step.own_parts[number], step.takes[number]
            is_early = step.num_done < step.program.features_from[number]
            if is_early or any(part not in step.encoded for part in parts):
                break
            step.num_features_posted += 1
            if parts or takes:
                own = {part: step.encoded.pop(part) for part in parts}
                posted = self._exchange.post_features(step.work.plan, step.work.transfers[number], own)
                step.unfinished.append(posted)
                if takes:
                    step.features[number] = posted

    def _post_gradients(self, step: _Step) -> None:
        """In the order of micro-batches, once the first stages are to have gone backward."""
        for number in range(step.num_gradients_posted, step.work.num_micro_batches):
            parts, takes = step.own_parts[number], step.takes[number]
            is_early = step.num_done < step.program.gradients_from[number]
            if is_early or (takes and number not in step.leaf_gradients):
                break
            step.num_gradients_posted += 1
            if parts or takes:
                gradient = step.leaf_gradients.pop(number, None)
                posted = self._exchange.post_gradients(step.work.plan, step.work.transfers[number], gradient)
                step.unfinished.append(posted)
                if parts:
                    step.gradients[number] = posted
                if takes:
                    step.leaving.append(posted)
                    self._make_room(step)

    def _make_room(self, step: _Step) -> None:
        """Wait until what a first stage has is within the bound, or all gradients that it has sent have left.

        Their encoders have been ready to receive them since the first stage was to have them, so this waits
        for nothing that comes later.
        """
        while step.leaving and step.held_bytes() > self._max_feature_bytes:
            step.leaving.popleft().finish()
            step.unfinished = [posted for posted in step.unfinished if not posted.is_done()]
