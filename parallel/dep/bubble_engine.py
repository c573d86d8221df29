"""One rank's part in a step whose tower runs in the pipeline's idle time (`dep.schedule=bubbles`).

    engine.start(work)              what has to be encoded before the pipeline starts
    engine.before_pass(num_done)    called whenever the rank may be about to wait, with the passes it has done
    engine.leaf(micro_batch)        the backbone takes the features of a micro-batch
    engine.finish()                 the rest, when the pipeline is done

Tasks run at the positions that the program gives them, however long passes take; see `parallel.dep.program`.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from parallel.dep.chunk_memory import Task
from parallel.dep.engine import Engine, EngineSetup, VisionWork
from parallel.dep.feature_exchange import Posted
from parallel.dep.program import Program
from parallel.dep.stats import VisionStats
from parallel.dep.vision_pass import BackwardInSteps, Chunk, EncodeInSteps, LayeredEncoder


@dataclass(slots=True)
class _Step:
    """State of the current step."""

    work: VisionWork
    """Plan of the global batch and this rank's pixels."""
    program: Program
    """When this rank does what."""
    own_parts: Sequence[Sequence[int]]
    """[micro-batch] -> parts that this rank encodes."""
    receives: Sequence[bool]
    """[micro-batch] -> whether this rank, of a first stage, takes any of its features."""
    tasks: deque[tuple[int, Task]]
    """(position, task) of the tasks that have not run yet, in order."""
    num_backward_tasks: int
    """Number of backward tasks that have not run yet."""
    sent_before: int
    """Bytes that the exchange had sent before the step."""
    stats: VisionStats = field(default_factory=VisionStats)
    """What this rank has done in the step."""
    num_done: int = -1
    """Passes that this rank has done; -1 before the step has started."""
    encoding: dict[int, EncodeInSteps] = field(default_factory=dict)
    """Chunk -> its suspended forward pass."""
    in_backward: dict[int, BackwardInSteps] = field(default_factory=dict)
    """Chunk -> its suspended recomputation and backward."""
    encoded: dict[int, Tensor] = field(default_factory=dict)
    """Part -> features [n, D] that are not posted yet."""
    num_features_posted: int = 0
    """Leading micro-batches whose features this rank has posted, where it sends or receives any."""
    features: dict[int, Posted[Tensor | None]] = field(default_factory=dict)
    """Micro-batch -> its features, posted and not yet taken by the first stage."""
    leaf_gradients: dict[int, Tensor] = field(default_factory=dict)
    """Micro-batch -> gradient [v, D] that is not posted yet."""
    num_gradients_posted: int = 0
    """Leading micro-batches whose gradients this rank has posted, where it sends or receives any."""
    gradients: dict[int, Posted[dict[int, Tensor]]] = field(default_factory=dict)
    """Micro-batch -> gradients of the features that this rank encoded, posted and not yet used."""
    sent_gradients: deque[Posted[dict[int, Tensor]]] = field(default_factory=deque)
    """Gradients that this first stage has posted and not yet waited for, in order."""
    part_gradients: dict[int, Tensor] = field(default_factory=dict)
    """Part -> gradient [n, D] that was received and not yet used."""
    unfinished: list[Posted[Any]] = field(default_factory=list)
    """Posted transfers that may still be in flight, in order."""
    is_reduced: bool = False
    """Whether the reduction of the encoder's gradients was started."""

    def held_bytes(self) -> int:
        """Bytes of features and gradients on this rank, without what the backbone has taken."""
        # A transfer can be both unfinished and waiting for the first stage: count it once.
        posted = {id(each): each.nbytes for each in [*self.unfinished, *self.features.values()]}
        at_rest = (self.encoded, self.leaf_gradients, self.part_gradients)
        return sum(posted.values()) + sum(rows.nbytes for each in at_rest for rows in each.values())


class BubbleEngine(Engine):
    """Runs the encoder of this rank between the passes of the pipeline."""

    def __init__(
        self, setup: EngineSetup, encoder: LayeredEncoder, *, after_backward: Callable[[], None]
    ) -> None:
        """
        Args:
            encoder: this rank's replica; its parameters collect gradients if it is trained.
            after_backward: called once per step, when this rank's gradients of the encoder are complete.
        """
        super().__init__(setup)
        self._encoder = encoder
        self._after_backward = after_backward
        self._step: _Step | None = None

    def start(self, work: VisionWork) -> None:
        """Do what is planned before the rank's first pass. Called by every rank."""
        assert work.program is not None, "BubblePlanner gives every step a program"
        self._step = step = self._begin(work, work.program)
        self._stats = step.stats
        self._exchange.connect(work.transfers)
        self.before_pass(0)

    def _begin(self, work: VisionWork, program: Program) -> _Step:
        rank = self._exchange.rank
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
            receives=[work.is_received_by(rank, number) for number in range(work.num_micro_batches)],
            tasks=tasks,
            num_backward_tasks=sum(not task.is_forward for _, task in tasks),
            sent_before=self._exchange.sent_bytes,
        )
        step.stats.num_patches = sum(chunk.pixels.shape[0] for chunk in work.chunks)
        return step

    def before_pass(self, num_done: int) -> None:
        """Do what is planned before the rank's next pass; repeated calls with one number do nothing."""
        step = self._current_step()
        if num_done <= step.num_done:
            return
        step.num_done = num_done

        # 1. Transfers that become due with this pass.
        self._post(step)

        # 2. Tasks of the tower, and the transfers that each makes possible.
        while step.tasks and step.tasks[0][0] <= step.num_done:
            position, task = step.tasks.popleft()
            # Work elsewhere may replace waiting, by how much is unknown: it does not count as exposed.
            is_exposed = self._exchange.is_first_stage and position in (0, step.program.num_passes)
            with self._stopwatch.timed(*["exposed_s"] * is_exposed):
                self._run(step, task)
            self._post(step)

        # 3. The reduction of the encoder's gradients, once it hides behind the last passes.
        is_late = step.num_done >= step.program.reduce_from
        if is_late and step.num_backward_tasks == 0 and not step.is_reduced:
            step.is_reduced = True
            self._after_backward()

    def leaf(self, micro_batch: int) -> Tensor | None:
        """The features [v, D] of a micro-batch; waits until they have arrived."""
        step = self._current_step()
        if not step.receives[micro_batch]:
            return None
        assert micro_batch in step.features, "by now the program has this rank's own share encoded and posted"
        with self._stopwatch.timed("exchange_s", "exposed_s"):
            features = step.features.pop(micro_batch).wait()
        assert features is not None

        def collect(gradient: Tensor) -> None:
            # The features are freed with their graph, the gradient once it has been sent.
            step.leaf_gradients[micro_batch] = gradient

        return self._make_leaf(features, collect)

    def finish(self) -> None:
        """Do the rest, and release pixels. Called by every rank when its passes are done."""
        step = self._current_step()
        self.before_pass(step.program.num_passes)
        assert not step.tasks
        with self._stopwatch.timed("exchange_s"):
            for posted in step.unfinished:
                posted.finish()
        step.stats.sent_bytes = self._exchange.sent_bytes - step.sent_before
        self._step = None

    def _current_step(self) -> _Step:
        assert self._step is not None, "call start first"
        return self._step

    def _run(self, step: _Step, task: Task) -> None:
        chunk, parts = step.work.chunks[task.chunk], step.work.plan.chunks[self._exchange.rank][task.chunk]
        if task.is_forward:
            self._encode(step, task, chunk, parts)
        else:
            self._go_backward(step, task, chunk, parts)

    def _encode(self, step: _Step, task: Task, chunk: Chunk, parts: Sequence[int]) -> None:
        """Some steps of a chunk's forward pass; after the last one its features wait for their transfer."""
        with self._phase("vision forward"), self._stopwatch.timed("forward_s"):
            if task.chunk not in step.encoding:
                step.encoding[task.chunk] = EncodeInSteps(self._encoder, chunk, self._device)
            features = step.encoding[task.chunk].advance(task.num_steps)
        if features is not None:
            del step.encoding[task.chunk]
            sizes = [step.work.plan.parts[part].num_tokens for part in parts]
            step.encoded |= zip(parts, features.split(sizes), strict=True)

    def _go_backward(self, step: _Step, task: Task, chunk: Chunk, parts: Sequence[int]) -> None:
        """Some steps of a chunk's recomputation and backward; the first may wait for the gradient."""
        with self._phase("vision backward"):
            is_new = task.chunk not in step.in_backward
            gradient = self._gradient(step, parts) if is_new else None
            with self._stopwatch.timed("backward_s"):
                if gradient is not None:
                    keeps = step.program.keeps_activations[task.chunk]
                    step.in_backward[task.chunk] = BackwardInSteps(
                        self._encoder, chunk, gradient, keeps_activations=keeps
                    )
                if step.in_backward[task.chunk].advance(task.num_steps):
                    del step.in_backward[task.chunk]
        step.num_backward_tasks -= 1

    def _gradient(self, step: _Step, parts: Sequence[int]) -> Tensor:
        """The gradient [n, D] of a chunk's features."""
        micro_batch = step.work.micro_batch_of(parts[0])
        if micro_batch in step.gradients:
            with self._stopwatch.timed("exchange_s"):
                step.part_gradients |= step.gradients.pop(micro_batch).wait()
        return torch.cat([step.part_gradients.pop(part) for part in parts])

    def _post(self, step: _Step) -> None:
        """Post the transfers that are due, and drop those that are done."""
        step.unfinished = [posted for posted in step.unfinished if not posted.is_done()]
        self._post_features(step)
        if self._is_trained:
            self._post_gradients(step)
        step.stats.peak_feature_bytes = max(step.stats.peak_feature_bytes, step.held_bytes())

    def _post_features(self, step: _Step) -> None:
        """Post features in the order of micro-batches, once the rank's own are encoded and it is the turn of
        a first stage to receive."""
        for number in range(step.num_features_posted, step.work.num_micro_batches):
            parts, receives = step.own_parts[number], step.receives[number]
            # Transfers are posted in one order on all ranks: the first that is not due stops the others.
            is_early = step.num_done < step.program.features_from[number]
            if is_early or any(part not in step.encoded for part in parts):
                break
            step.num_features_posted += 1
            # Ranks without a share of the micro-batch have nothing to post.
            if parts or receives:
                own = {part: step.encoded.pop(part) for part in parts}
                posted = self._exchange.post_features(step.work.transfers[number], own)
                step.unfinished.append(posted)
                if receives:
                    step.features[number] = posted

    def _post_gradients(self, step: _Step) -> None:
        """Post gradients in the order of micro-batches, once the plan has the first stages done with them."""
        for number in range(step.num_gradients_posted, step.work.num_micro_batches):
            parts, receives = step.own_parts[number], step.receives[number]
            # An encoder knows from the program alone when to post; the first stage also needs the gradient.
            is_early = step.num_done < step.program.gradients_from[number]
            if is_early or (receives and number not in step.leaf_gradients):
                break
            step.num_gradients_posted += 1
            if parts or receives:
                gradient = step.leaf_gradients.pop(number, None)
                posted = self._exchange.post_gradients(step.work.plan, step.work.transfers[number], gradient)
                step.unfinished.append(posted)
                if parts:
                    step.gradients[number] = posted
                if receives:
                    step.sent_gradients.append(posted)
                    self._bound_memory(step)

    def _bound_memory(self, step: _Step) -> None:
        """Wait for sent gradients until what a first stage holds is within the bound, or all have left.

        Their encoders have been ready to receive them since the time at which the plan has the first stage
        done with them, so this waits for nothing that comes later.
        """
        while step.sent_gradients and step.held_bytes() > self._max_feature_bytes:
            step.sent_gradients.popleft().finish()
            step.unfinished = [posted for posted in step.unfinished if not posted.is_done()]
