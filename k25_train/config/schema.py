"""The whole configuration of a run: its sections, and sizes that follow from several of them.

Values are in `conf/`, never here. Rules within a section are in its module, rules across sections in
`k25_train/compose/checks.py` and `plan_checks.py`.
"""

from dataclasses import dataclass, replace

from k25_train.config.activation import ActivationConfig
from k25_train.config.algorithm import AlgorithmConfig
from k25_train.config.basics import data_parallel_size, ranks_of_stage
from k25_train.config.checkpoint import CheckpointConfig
from k25_train.config.cluster import ClusterConfig
from k25_train.config.data import DataConfig
from k25_train.config.environment import EnvironmentConfig
from k25_train.config.metrics import MetricsConfig
from k25_train.config.model import ModelConfig
from k25_train.config.optimizer import OptimConfig
from k25_train.config.rollout import RolloutConfig
from k25_train.config.training import RunConfig, TrainConfig
from k25_train.config.vision import VisionPlacement
from parallel.config import DepConfig, ParallelismConfig


@dataclass(slots=True, kw_only=True)
class Config:
    """The whole configuration of a run; `k25_train/compose/resolve.py` builds and checks its sections."""

    model: ModelConfig
    """Dimensions of the model."""
    parallelism: ParallelismConfig
    """Pipeline, virtual-stage and expert-parallel sizes, and what is overlapped."""
    dep: DepConfig
    """Where and when the vision tower runs."""
    activation: ActivationConfig
    """Policy of each activation from its forward to its backward pass."""
    optim: OptimConfig
    """Update rules and learning rate."""
    data: DataConfig
    """Shard set, mixture and order of samples."""
    train: TrainConfig
    """Length, batch sizes and number format."""
    checkpoint: CheckpointConfig
    """Intervals and number of checkpoints."""
    metrics: MetricsConfig
    """What the run tells of itself while it trains."""
    algorithm: AlgorithmConfig | None
    """Reinforcement learning; null for training on `data`."""
    rollout: RolloutConfig | None
    """What generates responses; null without reinforcement learning."""
    environment: EnvironmentConfig | None
    """What they respond to; null without reinforcement learning."""
    run: RunConfig
    """Run folder."""
    cluster: ClusterConfig
    """Machines, scheduler and network."""

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return self.cluster.world_size

    @property
    def dp(self) -> int:
        """Replicas of the pipeline, each with sequences of its own."""
        return data_parallel_size(self.world_size, self.parallelism.pp, self.parallelism.cp)

    @property
    def dp_cp(self) -> int:
        """Ranks of a stage, which hold the same weights but for the routed experts'."""
        return ranks_of_stage(self.world_size, self.parallelism.pp)

    @property
    def expert_dp(self) -> int:
        """Data-parallel size of the routed experts' weights."""
        return self.dp_cp // self.parallelism.ep

    @property
    def vision_placement(self) -> VisionPlacement:
        """Where the vision tower and its projector are, and which of them are trained."""
        if not self.model.has_vision:
            return VisionPlacement.without_vision()
        return VisionPlacement.of(
            self.dep.mode,
            self.optim.trained_vision,
            merged_size=self.model.vision.merged_size,
            hidden_size=self.model.hidden_size,
        )

    def of_batch(self, size: int) -> "Config":
        """The configuration of a run whose batches all have so many sequences, for plans of such a step."""
        ramp = replace(self.train.batch_ramp, start=None)
        train = replace(self.train, global_batch_size=size, batch_ramp=ramp)
        return replace(self, train=train)

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of one step on each replica, the most of any step."""
        return self.train.global_batch_size // (self.train.micro_batch_size * self.dp)
