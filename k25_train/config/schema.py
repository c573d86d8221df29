"""Every configuration section: its fields, their meaning, unit and source, and the rules within the section.
The optimizer's sections stand in `optimizer.py`, what a cluster's job and network need in `cluster.py`.

Values stand in `conf/`, never here. Sources: "K2" is the Kimi K2 report (arXiv 2507.20534), "K2.5" the Kimi
K2.5 report (arXiv 2602.02276), "checkpoint" the config of the released moonshotai/Kimi-K2.5, "Moonlight" is
arXiv 2502.16982. Rules that read several sections stand in `checks.py`.
"""

from dataclasses import dataclass
from enum import Enum

from k25_train.config.activation import ActivationConfig
from k25_train.config.basics import DType, not_negative
from k25_train.config.cluster import FabricConfig, SlurmConfig
from k25_train.config.optimizer import OptimConfig, TrainedVision
from parallel.config import DepConfig, DepMode, ParallelismConfig, Problem, not_positive

SAMPLE_KINDS = ("text", "caption", "ocr", "video")
"""The kinds of sample that a shard set holds and `data.blend` gives shares to."""


class Device(Enum):
    """Where tensors live."""

    cpu = "cpu"
    cuda = "cuda"


@dataclass(slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding of the language model, stretched by YaRN (arXiv 2309.00071)."""

    theta: float
    """Base of the rotation periods. Source: checkpoint, `rope_theta`."""
    scaling_factor: float
    """How many times longer the context is than `original_max_position`; 1.0 is plain RoPE. Source:
    checkpoint, `rope_scaling.factor`."""
    original_max_position: int
    """Context length in tokens before stretching. Source: checkpoint."""
    beta_fast: float
    """Rotations within the original context above which a frequency is kept as it is. Source: checkpoint."""
    beta_slow: float
    """Rotations within the original context below which a frequency is stretched. Source: checkpoint."""
    mscale: float
    """Attention temperature coefficient of the cos and sin tables. Source: checkpoint."""
    mscale_all_dim: float
    """Attention temperature coefficient of the softmax scale. Source: checkpoint."""

    def problems(self) -> list[Problem]:
        """Every rule of this section that is broken."""
        found = not_positive(self, ("theta", "original_max_position", "beta_slow"))
        if self.scaling_factor < 1:
            found.append(
                Problem("scaling_factor", self.scaling_factor, "must be 1.0 (plain RoPE) or more", "use 1.0")
            )
        if self.beta_fast < self.beta_slow:
            rule = f"must not lie below beta_slow ({self.beta_slow})"
            found.append(Problem("beta_fast", self.beta_fast, rule, "the checkpoint has 32 and 1"))
        return found


@dataclass(slots=True, kw_only=True)
class VisionConfig:
    """MoonViT-3D, its preprocessing limits, and the projector's 2x2 merge."""

    patch_size: int
    """Edge of a square patch in pixels. Source: checkpoint."""
    num_layers: int
    """Transformer blocks. Source: checkpoint."""
    hidden_size: int
    """Width of a patch's features. Source: checkpoint."""
    ffn_hidden_size: int
    """Width of a block's MLP. Source: checkpoint."""
    num_attention_heads: int
    """Attention heads of a block. Source: checkpoint."""
    pos_emb_height: int
    """Rows of the learned position table, in patches; other heights are interpolated. Source: checkpoint."""
    pos_emb_width: int
    """Columns of the learned position table, in patches. Source: checkpoint."""
    pos_emb_time: int
    """Frames of the fixed temporal table: the most frames one chunk has. Source: checkpoint."""
    merge_size: int
    """Edge in patches of the square that becomes one token of the language model. Source: checkpoint."""
    rope_theta: float
    """Base of the 2-D rotation periods. Source: checkpoint's model code."""
    rope_max_grid: int
    """Largest height and width, in patches, of the 2-D rotation table. Source: checkpoint's model code."""
    layer_norm_eps: float
    """Epsilon of the tower's and the projector's layer norms. Source: checkpoint, `projector_ln_eps`."""
    image_patch_limit: int
    """Most patches of an image; larger ones are scaled down. Source: checkpoint, `in_patch_limit`."""
    side_patch_limit: int
    """Most patches along one side. Source: checkpoint, `patch_limit_on_one_side`."""
    frame_patch_limit: int
    """Most patches of a video frame. Source: checkpoint, `in_patch_limit_each_frame`."""
    video_fps: float
    """Frames sampled from a second of video. Source: checkpoint, `sample_fps`."""

    @property
    def merged_size(self) -> int:
        """Width of what becomes one token of the language model: the features of merged patches in a row."""
        return self.merge_size**2 * self.hidden_size

    def problems(self) -> list[Problem]:
        """Every rule of this section that is broken."""
        sizes = (
            "patch_size num_layers hidden_size ffn_hidden_size num_attention_heads pos_emb_height "
            "pos_emb_width pos_emb_time merge_size rope_theta rope_max_grid layer_norm_eps "
            "image_patch_limit side_patch_limit frame_patch_limit video_fps"
        )
        found = not_positive(self, sizes.split())
        if found:
            return found
        if self.hidden_size % (4 * self.num_attention_heads):
            rule = (
                f"must be a multiple of 4 x num_attention_heads ({self.num_attention_heads}): "
                "2-D RoPE rotates pairs along x and along y"
            )
            remedy = f"use a multiple of {4 * self.num_attention_heads}, or change the heads"
            found.append(Problem("hidden_size", self.hidden_size, rule, remedy))
        if self.merge_size != 2:
            rule = "must be 2: the chat format counts (h/2)(w/2) tokens an item"
            found.append(Problem("merge_size", self.merge_size, rule, "use 2"))
        if self.side_patch_limit > self.rope_max_grid:
            rule = f"must not exceed rope_max_grid ({self.rope_max_grid})"
            remedy = "lower the limit or raise the grid"
            found.append(Problem("side_patch_limit", self.side_patch_limit, rule, remedy))
        for name in ("image_patch_limit", "frame_patch_limit"):
            limit = getattr(self, name)
            if limit < self.merge_size**2:
                rule = f"must leave room for one merged token ({self.merge_size**2} patches)"
                found.append(Problem(name, limit, rule, f"use {self.merge_size**2} or more"))
        return found


@dataclass(slots=True, kw_only=True)
class ModelConfig:
    """The language model (MLA attention, mixture of experts) with its vision tower."""

    name: str
    """Name of the model in logs and tables."""
    num_layers: int
    """Transformer layers. Source: checkpoint."""
    num_dense_layers: int
    """Leading layers with a dense MLP instead of experts. Source: checkpoint, `first_k_dense_replace`."""
    hidden_size: int
    """Width of a token's features. Source: checkpoint."""
    num_attention_heads: int
    """Attention heads of a layer. Source: checkpoint."""
    q_lora_rank: int
    """Width of the compressed query. Source: checkpoint."""
    kv_lora_rank: int
    """Width of the compressed key and value. Source: checkpoint."""
    qk_nope_head_dim: int
    """Width of a head's query and key that carries no position. Source: checkpoint."""
    qk_rope_head_dim: int
    """Width of a head's query, and of the key all heads share, that is rotated. Source: checkpoint."""
    v_head_dim: int
    """Width of a head's value. Source: checkpoint."""
    dense_ffn_hidden_size: int
    """Width of a dense layer's SwiGLU. Source: checkpoint, `intermediate_size`."""
    expert_ffn_hidden_size: int
    """Width of one expert's SwiGLU. Source: checkpoint, `moe_intermediate_size`."""
    num_experts: int
    """Routed experts of a layer. Source: checkpoint."""
    num_experts_per_token: int
    """Routed experts that a token is sent to. Source: checkpoint."""
    num_shared_experts: int
    """Experts that every token passes. Source: checkpoint."""
    routed_scaling_factor: float
    """Factor on the renormalised weights of a token's experts. Source: checkpoint."""
    balance_loss_coeff: float
    """Weight of the sequence-wise balance loss. Source: checkpoint, `aux_loss_alpha`; reports are silent."""
    expert_bias_update_rate: float
    """Step of the router's expert bias after each global batch. Source: Moonlight, appendix C;
    K2's own value is not disclosed."""
    rms_norm_eps: float
    """Epsilon of every RMSNorm but the latent ones. Source: checkpoint."""
    latent_norm_eps: float
    """Epsilon of the norms of the compressed query and key-value. Source: checkpoint's model code, which
    leaves them at the default, whatever `rms_norm_eps` says; transformers does as well."""
    vocab_size: int
    """Rows of the embedding and of the untied output head. Source: checkpoint."""
    init_std: float
    """Standard deviation of initial weights. Source: checkpoint, `initializer_range`."""
    rope: RopeConfig
    """Rotary position embedding."""
    vision: VisionConfig
    """Vision tower and projector."""

    @property
    def q_head_dim(self) -> int:
        """Width of a head's query and key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def problems(self) -> list[Problem]:
        """Every rule of this section that is broken, those of its sub-sections included."""
        sizes = (
            "num_layers hidden_size num_attention_heads q_lora_rank kv_lora_rank qk_nope_head_dim "
            "qk_rope_head_dim v_head_dim dense_ffn_hidden_size expert_ffn_hidden_size num_experts "
            "num_experts_per_token num_shared_experts routed_scaling_factor rms_norm_eps latent_norm_eps "
            "vocab_size init_std"
        )
        found = not_positive(self, sizes.split())
        found += not_negative(self, ("num_dense_layers", "balance_loss_coeff", "expert_bias_update_rate"))
        found += self._attention_problems() + self._expert_problems()
        found += [problem.under("rope") for problem in self.rope.problems()]
        return found + [problem.under("vision") for problem in self.vision.problems()]

    def _attention_problems(self) -> list[Problem]:
        found = []
        for name in ("qk_nope_head_dim", "qk_rope_head_dim"):
            dim = getattr(self, name)
            if dim % 2:
                rule = "must be even: rotation works on pairs, and attention kernels want even heads"
                found.append(Problem(name, dim, rule, f"use {dim + 1}"))
        if self.v_head_dim > self.q_head_dim:
            rule = (
                f"must not exceed qk_nope_head_dim + qk_rope_head_dim ({self.q_head_dim}), its padded width"
            )
            found.append(Problem("v_head_dim", self.v_head_dim, rule, f"use {self.q_head_dim} or less"))
        return found

    def _expert_problems(self) -> list[Problem]:
        found = []
        for name in ("hidden_size", "expert_ffn_hidden_size"):
            size = getattr(self, name)
            if size % 8:
                rule = (
                    "must be a multiple of 8: grouped expert products need rows of whole 16 bytes in bfloat16"
                )
                found.append(Problem(name, size, rule, f"use {size - size % 8 + 8}"))
        if self.num_experts_per_token > self.num_experts:
            rule = f"must not exceed num_experts ({self.num_experts})"
            remedy = "send a token to fewer experts"
            found.append(Problem("num_experts_per_token", self.num_experts_per_token, rule, remedy))
        if self.num_dense_layers > self.num_layers:
            rule = f"must not exceed num_layers ({self.num_layers})"
            found.append(Problem("num_dense_layers", self.num_dense_layers, rule, "make fewer layers dense"))
        return found


@dataclass(slots=True, kw_only=True)
class DataConfig:
    """What is read, and in which mixture."""

    dir: str
    """Folder of the shard set (`dataset.json`, shards, indices)."""
    tokenizer: str | None
    """Path of a `tokenizer.json` or of a Kimi `tiktoken.model`; null is the shard set's own."""
    blend: dict[str, float]
    """Share of the sequences by sample kind (text, caption, ocr, video); kinds left out are not read. Source:
    held constant through training, ratio not disclosed (K2.5, section 4.1)."""
    shuffle: bool
    """Whether samples are drawn in an order that depends on the seed."""
    max_skipped_samples: int
    """Undecodable samples in a run beyond which it stops."""
    prefetch_steps: int
    """Steps whose batches are made ready ahead of use; 0 makes each when it is needed."""
    limit_samples: int | None
    """Only the first samples of each kind are used; null is all of them."""

    def problems(self) -> list[Problem]:
        """Every rule of this section that is broken."""
        found = not_negative(self, ("max_skipped_samples", "prefetch_steps"))
        if not self.dir:
            found.append(
                Problem("dir", self.dir, "must name a folder", "build one: python -m k25_train.data build")
            )
        if self.limit_samples is not None:
            found += not_positive(self, ("limit_samples",))
        for kind, share in self.blend.items():
            if kind not in SAMPLE_KINDS:
                rule = f"is not a kind of sample; known kinds: {', '.join(SAMPLE_KINDS)}"
                found.append(Problem(f"blend.{kind}", share, rule, "correct or remove it"))
            if share <= 0:
                remedy = "leave out a kind that is not wanted: ~data.blend." + kind
                found.append(Problem(f"blend.{kind}", share, "must be positive", remedy))
        total = sum(self.blend.values())
        if abs(total - 1) > 1e-6:
            found.append(
                Problem("blend", self.blend, f"shares must sum to 1, not {total:g}", "rescale the shares")
            )
        return found


@dataclass(slots=True, kw_only=True)
class TrainConfig:
    """Length, batch and number format of the run."""

    steps: int
    """Optimizer steps of the whole run."""
    seq_len: int
    """Tokens of a packed sequence, media tokens included. Source: 4096 in K2.5, table 3."""
    global_batch_size: int
    """Sequences of one optimizer step over all ranks. Source: 67M tokens in K2, section 2.5."""
    micro_batch_size: int
    """Sequences that one data-parallel rank computes at once. Source: not disclosed, our choice."""
    seed: int
    """Seed of initial weights and data order."""
    dtype: DType
    """Format of weights and activations; gradients are summed and masters kept in float32."""
    eval_interval: int
    """Steps between evaluations on held-out data."""
    eval_sequences: int
    """Held-out sequences of one evaluation: half text, half with media."""
    transformer_engine: bool
    """Whether layers of Transformer Engine replace megatron-core's own; CUDA only."""
    stall_timeout_s: float
    """Seconds without progress after which a rank reports where it waits and for whom, and ends the job.
    Source: not disclosed, our choice."""
    trace_step: int | None
    """The step whose timeline over all ranks is written to the run folder; null is none."""

    def problems(self) -> list[Problem]:
        """Every rule of this section that is broken."""
        sizes = (
            "steps",
            "seq_len",
            "global_batch_size",
            "micro_batch_size",
            "eval_interval",
            "eval_sequences",
        )
        found = not_positive(self, (*sizes, "stall_timeout_s")) + not_negative(self, ("seed",))
        if self.eval_sequences % 2:
            rule = "must be even: half of them are text, half have media"
            found.append(
                Problem("eval_sequences", self.eval_sequences, rule, f"use {self.eval_sequences + 1}")
            )
        if self.trace_step is not None and not 1 <= self.trace_step <= self.steps:
            rule = f"must be a step of the run, 1 to steps ({self.steps})"
            found.append(Problem("trace_step", self.trace_step, rule, "name one, or null for no timeline"))
        return found


@dataclass(slots=True, kw_only=True)
class CheckpointConfig:
    """When the state of the run is saved."""

    interval: int
    """Steps between checkpoints; the last step and SIGTERM save as well."""
    keep: int
    """Newest checkpoints that stay on disk."""
    resume: bool
    """Whether a run whose folder holds a checkpoint goes on from the newest."""

    def problems(self) -> list[Problem]:
        """Every rule of this section that is broken."""
        return not_positive(self, ("interval", "keep"))


@dataclass(slots=True, kw_only=True)
class RunConfig:
    """Where the run writes."""

    dir: str
    """Folder of config, metrics, checkpoints, logs and plots."""

    def problems(self) -> list[Problem]:
        """Every rule of this section that is broken."""
        return [] if self.dir else [Problem("dir", self.dir, "must name a folder", "e.g. run.dir=runs/smoke")]


@dataclass(slots=True, kw_only=True)
class ClusterConfig:
    """The machines."""

    name: str
    """Name of the cluster in logs and tables."""
    device: Device
    """Where tensors live."""
    nodes: int
    """Machines of the job."""
    gpus_per_node: int
    """Ranks of a machine: its GPUs, or as many processes where the device is the CPU."""
    model_tflops: float
    """Model FLOPs that a rank computes in a second while it trains, in units of 1e12. This and the two below
    need to be right beside each other only: plans of what runs when rest on them (`dep.schedule=bubbles`)."""
    network_gb_per_s: float
    """Bytes that a rank sends in a second, in units of 1e9."""
    host_copy_gb_per_s: float
    """Bytes that a rank copies from host memory to its device in a second, in units of 1e9."""
    gpu_memory_gb: float | None
    """Memory of a GPU, in units of 1e9 bytes; null where the device is the CPU."""
    host_memory_gib: float
    """Memory of a machine."""
    slurm: SlurmConfig | None
    """Its scheduler; null where jobs are started by hand."""
    fabric: FabricConfig | None
    """The network between its GPUs; null where there is none to set up."""

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return self.nodes * self.gpus_per_node

    def problems(self) -> list[Problem]:
        """Every rule of this section that is broken."""
        rates = ("model_tflops", "network_gb_per_s", "host_copy_gb_per_s", "host_memory_gib")
        found = not_positive(self, ("nodes", "gpus_per_node", *rates))
        if self.gpu_memory_gb is not None:
            found += not_positive(self, ("gpu_memory_gb",))
        elif self.device is Device.cuda:
            rule = "must be given where cluster.device is cuda"
            found.append(Problem("gpu_memory_gb", None, rule, "use what the data sheet says, e.g. 80"))
        if self.slurm is not None:
            found += [problem.under("slurm") for problem in self.slurm.problems()]
            least = self.slurm.min_nodes
            if least is not None and not 1 <= least <= self.nodes:
                rule = f"must lie within 1 to cluster.nodes ({self.nodes})"
                remedy = "use null, which never goes on with fewer"
                found.append(Problem("slurm.min_nodes", least, rule, remedy))
        if self.fabric is not None:
            found += [problem.under("fabric") for problem in self.fabric.problems()]
        return found


@dataclass(slots=True, kw_only=True)
class Config:
    """The whole configuration of a run. Sections are made and checked by `resolve`."""

    model: ModelConfig
    """What is trained."""
    parallelism: ParallelismConfig
    """How the model is cut over ranks."""
    dep: DepConfig
    """How the vision tower takes part."""
    activation: ActivationConfig
    """What is done with activations until the backward pass."""
    optim: OptimConfig
    """How weights are updated."""
    data: DataConfig
    """What is read."""
    train: TrainConfig
    """How long, in which batches."""
    checkpoint: CheckpointConfig
    """When the state is saved."""
    run: RunConfig
    """Where the run writes."""
    cluster: ClusterConfig
    """The machines."""

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return self.cluster.world_size

    @property
    def dp(self) -> int:
        """Data-parallel size of all weights but the routed experts'."""
        return self.world_size // self.parallelism.pp

    @property
    def expert_dp(self) -> int:
        """Data-parallel size of the routed experts' weights."""
        return self.dp // self.parallelism.ep

    @property
    def has_projector_in_first_stage(self) -> bool:
        """Whether the projector belongs to the backbone: beside a coupled tower, or trained behind a frozen
        one. In the latter case no gradient has to leave the first stage."""
        return self.dep.mode is DepMode.coupled or self.optim.vision.trained is TrainedVision.projector

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of one step on each data-parallel rank."""
        return self.train.global_batch_size // (self.train.micro_batch_size * self.dp)
