"""Plans and reads the global batch of a step's trajectories, with sequences of `data` next to them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from k25_train.config.schema import Config
from k25_train.data.batch import MicroBatch, MicroBatchAssembler, Reads
from k25_train.data.loader import DataLoader
from k25_train.data.micro_batches import read_micro_batches
from k25_train.data.mix.plan import PieceSource, StepPlan
from k25_train.data.mix.ragged import sums_of
from k25_train.data.mix.sequences import Sequences
from k25_train.data.readable_source import ReadableSource
from k25_train.data.trajectories.documents import NAME, Rollouts
from k25_train.data.trajectories.packing import dealt, num_padded, packed, with_padding
from k25_train.data.trajectories.reading import StepFile
from k25_train.data.trajectories.step_file import step_path
from k25_train.data.units import GroupedReading, ReadHere, UnitReading
from k25_train.data.units_here import UnitsHere
from k25_train.errors import ConfigError
from parallel.pipeline.micro_batches import fewest_micro_batches

DATA_STATE = "data"
"""Key of a state under which that of `data` is, where sequences of it are trained on."""


class TrajectoryLoader:
    """A `share_reader.PlanReader` of step files. One thread uses it.

    megatron-core divides the gradient by the D tokens of the step that have a loss: the G generated ones and
    the P of sequences of `data`. Weights of the file are made for a division by G, so they are multiplied by
    D / G, and the next-token loss gets `ptx_coeff` * D / P.
    """

    def __init__(self, config: Config, data: DataLoader, folder: Path) -> None:
        """
        Args:
            config: with an `algorithm`.
            data: its sources are held out of, and trained on with `algorithm.ptx_coeff`.
            folder: of the step files.

        Raises `ConfigError` for a source that has the name of the trajectories.
        """
        assert config.algorithm is not None
        if NAME in data.sources:
            raise ConfigError(
                f"data.sources.{NAME}: is what trajectories are called: give the source another name"
            )
        self._config = config
        self._data = data
        self._folder = folder
        self._coeff = config.algorithm.ptx_coeff
        vision, tokenizer = config.model.vision, data.tokenizer
        self._rollouts = Rollouts(folder, config.data, vision, tokenizer.media_pad)
        self.sources: Mapping[str, ReadableSource] = {**data.sources, NAME: self._rollouts}
        """Those of `data`, then the trajectories."""
        self._assembler = MicroBatchAssembler(
            vision=vision,
            seq_len=config.train.seq_len,
            pad_token=tokenizer.pad,
            media_pad=tokenizer.media_pad,
            skip_log=data.skip_log,
            sources=self.sources,
            policy=self._rollouts,
        )
        units = UnitsHere(self.sources, self._assembler)
        self.reading: UnitReading = GroupedReading(ReadHere(units.read), vision)
        self._states: dict[int, dict[str, Any]] = {}

    def plan(self, step: int) -> StepPlan:
        """The global batch of a step (counted from 0), whose file has to be there.

        Raises `DataError` for a file that cannot be read, and for a trajectory that is longer than a
        sequence.
        """
        # 1. Trajectories in sequences.
        file = StepFile(step_path(self._folder, step + 1))
        state = dict(file.state)
        self._rollouts.turn_to(file)
        parts = [packed(file.lengths, file.names, self._rollouts.grids(), self._config.train.seq_len)]
        pieces: list[PieceSource] = []
        numbers = [np.zeros(0, dtype=np.int64)]

        # 2. Sequences of `data` next to them, and how both are weighted.
        num_generated, num_targets = int(file.num_generated.sum()), 0
        if self._coeff:
            beside = self._data.plan(step)
            num_targets = self._num_targets(beside)
            parts.insert(0, beside.sequences_of)
            numbers.append(beside.source)
            pieces += beside.sources
            state[DATA_STATE] = self._data.state_after(beside)
        total = num_generated + num_targets
        self._rollouts.weigh(total / max(num_generated, 1), self._coeff * total / max(num_targets, 1))
        self._states = {step: state}

        # 3. As many as the layout needs, in the order of replicas.
        sequences = self._padded(Sequences.joined(parts))
        source = np.full(len(sequences.offsets) - 1, len(pieces), dtype=np.int64)
        beside_them = np.concatenate(numbers)
        source[: len(beside_them)] = beside_them
        order = dealt(sums_of(sequences.lengths, sequences.offsets), self._config.dp)
        return StepPlan(
            step=step,
            source=source[order],
            sequences_of=sequences.chosen(order),
            sources=[*pieces, self._rollouts],
        )

    def _padded(self, sequences: Sequences) -> Sequences:
        sizes, size = self._config.parallelism, self._config.train.micro_batch_size
        fewest = fewest_micro_batches(sizes.pp, sizes.vpp, overlaps=sizes.overlap_expert_comm)
        number = num_padded(len(sequences.offsets) - 1, self._config.dp, size, fewest)
        return with_padding(sequences, number)

    def _num_targets(self, plan: StepPlan) -> int:
        """Tokens with a loss of a plan of `data`, from the index alone."""
        found = 0
        for sequence in plan.sequences:
            documents = self.sources[sequence.source].documents
            for piece in sequence.pieces:
                stop = piece.start + piece.length
                found += documents.num_targets(piece.record, piece.media, piece.start + 1, stop)
        return found

    def plan_evaluation(self, num_sequences: int, shuffle_media_seed: int | None = None) -> StepPlan:
        """Held-out sequences of `data`; every token of them with a loss counts alike."""
        self._rollouts.weigh(0.0, 1.0)
        return self._data.plan_evaluation(num_sequences, shuffle_media_seed)

    def state_after(self, plan: StepPlan) -> dict[str, Any]:
        """Where the run is after the step that was planned last: what its file says."""
        return self._states[plan.step]

    def micro_batches(self, plan: StepPlan, *, dp_rank: int, dp_size: int, reads: Reads) -> list[MicroBatch]:
        """See `PlanReader`. Raises as `read_micro_batches`, and for what of a file is damaged."""
        sequences, size = plan.sequences, self._config.train.micro_batch_size
        share = len(sequences) // dp_size
        first = dp_rank * share
        batches = [tuple(sequences[i : i + size]) for i in range(first, first + share, size)]
        skip_log = self._data.skip_log
        return list(read_micro_batches(batches, reads, self.reading, self._assembler, skip_log))
