"""Rules that read more than one section of the configuration, one small function each.

The parameters of a rule are the sections that it reads. It is skipped where one of them is broken in itself,
since its arithmetic would be meaningless.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Protocol

from k25_train.compose import context_checks, data_checks, dispatcher_checks, reinforcement_checks
from k25_train.config.basics import DType, data_parallel_size, ranks_of_stage
from k25_train.config.cluster import ClusterConfig, Device
from k25_train.config.data import DataConfig
from k25_train.config.model import ModelConfig
from k25_train.config.optimizer import OptimConfig
from k25_train.config.training import TrainConfig
from k25_train.plan.schedule import Schedule
from k25_train.plan.stack_cost import stack_cost
from parallel.communicators import MAX_SPINNING_CTAS, communicators_of, spinning_ctas
from parallel.config import DepConfig, ParallelismConfig, Problem
from parallel.pipeline.balance import plan_layout
from parallel.pipeline.layout import LayoutError, fitting_sizes, most_chunks, parse_layout
from parallel.pipeline.micro_batches import fewest_micro_batches

HEAD_MULTIPLE, LARGEST_HEAD = 8, 256
"""Head sizes that FlashAttention 2 takes (torch 2.13), and cuDNN on Hopper (Transformer Engine 2.20)."""


class Section(Protocol):
    """A part of the configuration that can report which of its rules are broken."""

    def problems(self) -> list[Problem]:
        """Every rule of this section that is broken."""


def find_problems(sections: Mapping[str, Section | None]) -> list[Problem]:
    """Every broken rule within and across the sections that could be built.

    Args:
        sections: name of a section -> the section, None where the configuration has none; those that could
            not be built are left out. Rules that read a section which is None are given None.
    """
    found = {
        name: [] if section is None else [problem.under(name) for problem in section.problems()]
        for name, section in sections.items()
    }
    sound = {name: section for name, section in sections.items() if not found[name]}
    problems = [problem for of_section in found.values() for problem in of_section]
    for rule in RULES:
        needed = inspect.signature(rule).parameters
        if all(name in sound for name in needed):
            problems += rule(**{name: sound[name] for name in needed})
    return problems


def pipeline_divides_ranks(cluster: ClusterConfig, parallelism: ParallelismConfig) -> list[Problem]:
    """The ranks form whole pipelines."""
    if cluster.world_size % parallelism.pp == 0:
        return []
    rule = f"must divide the {cluster.world_size} ranks (nodes {cluster.nodes} x {cluster.gpus_per_node})"
    remedy = f"use one of {divisors(cluster.world_size)}, or change cluster.nodes and cluster.gpus_per_node"
    return [Problem("parallelism.pp", parallelism.pp, rule, remedy)]


def layers_fill_pipeline(
    model: ModelConfig,
    train: TrainConfig,
    optim: OptimConfig,
    cluster: ClusterConfig,
    parallelism: ParallelismConfig,
) -> list[Problem]:
    """There is a layer for every chunk that needs one, and a written layout adds up."""
    pp, vpp = parallelism.pp, parallelism.vpp
    # 1. The layout that balances costs, if there is one.
    try:
        cost = stack_cost(model, train, optim, cluster, parallelism)
        planned = plan_layout(cost, pp, vpp).to_megatron()
    except LayoutError:
        planned = None
    # 2. Without a layout in the configuration, there has to be one.
    if parallelism.layout is None and planned is None:
        chunks, most = pp * vpp, most_chunks(model.num_layers)
        rule = (
            f"cuts {model.num_layers} layers into pp x vpp = {chunks} chunks; all but the first and the last "
        )
        rule += f"need a layer, so {most} are the most"
        return [Problem("parallelism.pp", pp, rule, sizes_that_fit(model, cluster, parallelism))]
    if parallelism.layout is None:
        return []
    # 3. A layout in the configuration has to describe these layers and chunks.
    try:
        parse_layout(parallelism.layout, model.num_layers, pp, vpp)
    except LayoutError as error:
        remedy = sizes_that_fit(model, cluster, parallelism)
        if planned is not None:
            remedy = f"correct it, or use null, which gives {planned}"
        return [Problem("parallelism.layout", parallelism.layout, str(error), remedy)]
    return []


def sizes_that_fit(model: ModelConfig, cluster: ClusterConfig, parallelism: ParallelismConfig) -> str:
    """The pipeline sizes that these layers and ranks allow, those nearest to the configured ones first."""
    # Neighbouring ranks of a pipeline stage share the experts.
    ranks = cluster.world_size // parallelism.ep or cluster.world_size
    choices = [size for size in range(1, ranks + 1) if ranks % size == 0]
    pairs = fitting_sizes(model.num_layers, choices, parallelism.pp, parallelism.vpp)
    return "use one of (pp, vpp) = " + ", ".join(map(str, pairs))


def experts_divide(
    model: ModelConfig, cluster: ClusterConfig, parallelism: ParallelismConfig
) -> list[Problem]:
    """Expert groups hold whole experts and lie within the data-parallel ranks."""
    found = []
    if model.num_experts % parallelism.ep:
        rule = f"must divide model.num_experts ({model.num_experts})"
        remedy = f"use one of {divisors(model.num_experts)}"
        found.append(Problem("parallelism.ep", parallelism.ep, rule, remedy))
    of_stage = ranks_of_stage(cluster.world_size, parallelism.pp)
    if cluster.world_size >= parallelism.pp and of_stage % parallelism.ep:
        rule = f"must divide the {of_stage} ranks of a stage ({cluster.world_size} / pp {parallelism.pp})"
        remedy = f"use one of {divisors(of_stage)}, or change pp or the number of ranks"
        found.append(Problem("parallelism.ep", parallelism.ep, rule, remedy))
    return found


def overlap_has_experts(model: ModelConfig, parallelism: ParallelismConfig) -> list[Problem]:
    """The overlapped schedule runs models that end with experts.

    After a dense last layer it leaves the final norm out, silently (megatron-core 0.19.2,
    `models/gpt/fine_grained_callables.py`: only the experts' part of a layer applies it).
    """
    if not parallelism.overlap_expert_comm or model.num_moe_layers:
        return []
    rule = f"needs layers with experts; all {model.num_layers} are dense (model.num_dense_layers)"
    remedy = "set overlap_expert_comm and delay_wgrad to false, or make fewer layers dense"
    return [Problem("parallelism.overlap_expert_comm", True, rule, remedy)]


def batches_divide(
    train: TrainConfig, cluster: ClusterConfig, parallelism: ParallelismConfig
) -> list[Problem]:
    """Global and evaluation batches are cut into equal micro-batches, as many as the schedule needs."""
    found = []
    if cluster.world_size % (parallelism.pp * parallelism.cp):
        return []  # There are no whole replicas: advice on batches would be for a wrong number of them.
    dp = data_parallel_size(cluster.world_size, parallelism.pp, parallelism.cp)
    unit = train.micro_batch_size * dp
    terms = f"micro_batch_size {train.micro_batch_size} x data-parallel size {dp}"
    start = train.batch_ramp.start
    sizes = {"global_batch_size": train.global_batch_size, "eval_sequences": train.eval_sequences}
    if start is not None:
        sizes |= {"batch_ramp.start": start, "batch_ramp.increment": train.batch_ramp.increment}
    for name, size in sizes.items():
        needed, reason = needed_micro_batches(name, parallelism)
        # Half of the evaluation sequences are text, half have media.
        step = math.lcm(unit, 2) if name == "eval_sequences" else unit
        above = max(-(-needed * unit // step) * step, size - size % step + step)
        if size % unit:
            rule = f"must be a multiple of {unit} ({terms})"
            below = size - size % step
            remedy = f"use {below} or {above}" if below >= needed * unit else f"use {above}"
            found.append(Problem(f"train.{name}", size, rule, remedy))
        elif size < needed * unit:
            rule = f"must be {needed * unit} or more ({needed} x {terms}): {reason}"
            found.append(Problem(f"train.{name}", size, rule, f"use {above}, or smaller micro-batches"))
    return found


def needed_micro_batches(name: str, parallelism: ParallelismConfig) -> tuple[int, str]:
    """The fewest micro-batches of a step or of an evaluation on a data-parallel rank, and why."""
    if name == "batch_ramp.increment":
        return 1, ""
    overlaps = parallelism.overlap_expert_comm and name != "eval_sequences"
    fewest = fewest_micro_batches(parallelism.pp, parallelism.vpp, overlaps=overlaps)
    if parallelism.vpp > 1:
        return fewest, "with vpp > 1 each of the pp ranks starts on its own micro-batch"
    if overlaps:
        return fewest, "parallelism.overlap_expert_comm runs one micro-batch concurrently with another"
    return fewest, ""


def schedule_fits_run(optim: OptimConfig, train: TrainConfig) -> list[Problem]:
    """Warm-up and decay do not overlap; the ramp, and the part with frozen biases, lie within the run."""
    schedule = Schedule(optim, train)
    if not schedule.fits:
        rule = f"must leave room for optim.warmup ({optim.warmup}) + optim.decay ({optim.decay})"
        remedy = "train for more steps, or shorten warm-up and decay"
        return [Problem("train.steps", train.steps, rule, remedy)]
    if not schedule.fits_frozen_bias:
        rule = f"must not be longer than the run ({train.steps:,} steps)"
        remedy = "shorten it, or use 0 to let router biases move to the end"
        return [Problem("optim.frozen_expert_bias", optim.frozen_expert_bias, rule, remedy)]
    if train.batches.stretches[-1].first_step > train.steps:
        rule = f"must end within the run ({train.steps:,} steps), with batches of {train.global_batch_size}"
        remedy = "shorten it, train for more steps, or use train.batch_ramp.start=null for no ramp"
        return [Problem("train.batch_ramp.length", train.batch_ramp.length, rule, remedy)]
    return []


def reads_end_before_stalls(data: DataConfig, train: TrainConfig) -> list[Problem]:
    """What hangs while it is read is named, before the watchdog ends the job as one that has stalled."""
    most_s = train.stall_timeout_s / data.num_timeouts
    if data.read_timeout_s < most_s:
        return []
    what = "a worker is waited for" if data.workers else "a read is tried"
    rule = (
        f"must be below {most_s:g}: {what} for {data.num_timeouts} times as long, which has to end before "
        f"train.stall_timeout_s={train.stall_timeout_s:g}"
    )
    longer = f"train.stall_timeout_s={math.floor(data.num_timeouts * data.read_timeout_s) + 1}"
    return [Problem("data.read_timeout_s", data.read_timeout_s, rule, f"use {most_s / 2:g}, or {longer}")]


def context_fits_rope(model: ModelConfig, train: TrainConfig) -> list[Problem]:
    """Positions stay within the context that the rotary embedding was stretched to."""
    longest = int(model.rope.original_max_position * model.rope.scaling_factor)
    if train.seq_len <= longest:
        return []
    rule = f"must not exceed rope.original_max_position x rope.scaling_factor ({longest})"
    return [Problem("train.seq_len", train.seq_len, rule, f"use {longest} or less, or stretch model.rope")]


def kernels_fit_a_gpu(
    cluster: ClusterConfig, parallelism: ParallelismConfig, dep: DepConfig
) -> list[Problem]:
    """What waits for other ranks on a GPU fits it together; else ranks could wait in a circle."""
    communicators = communicators_of(parallelism, dep, cluster.world_size)
    taken = spinning_ctas(communicators)
    if cluster.device is not Device.cuda or taken <= MAX_SPINNING_CTAS:
        return []
    sms, others = parallelism.dispatcher_sms, taken - (parallelism.dispatcher_sms or 0)
    rule = (
        f"must leave room: with the other {others} SMs, kernels that wait for other ranks would take {taken} "
    )
    rule += f"of the {MAX_SPINNING_CTAS} that they can have at once"
    remedy = f"use at most {MAX_SPINNING_CTAS - others}"
    return [Problem("parallelism.dispatcher_sms", sms, rule, remedy)]


def transformer_engine_has_cuda(train: TrainConfig, cluster: ClusterConfig) -> list[Problem]:
    """Transformer Engine has kernels for CUDA only."""
    if not train.transformer_engine or cluster.device is Device.cuda:
        return []
    rule = f"needs cluster.device=cuda, not {cluster.device.value}"
    return [Problem("train.transformer_engine", True, rule, "use train.transformer_engine=false")]


def attention_takes_heads(model: ModelConfig, train: TrainConfig, cluster: ClusterConfig) -> list[Problem]:
    """On CUDA, the kernels for packed documents and items take bfloat16 heads of some sizes only."""
    if cluster.device is not Device.cuda or train.dtype is not DType.bfloat16:
        return []
    vision = model.vision
    found = []
    for key, value, size in (
        ("model.qk_nope_head_dim", model.qk_nope_head_dim, model.q_head_dim),
        ("model.v_head_dim", model.v_head_dim, model.v_head_dim),
        ("model.vision.hidden_size", vision.hidden_size, vision.hidden_size // vision.num_attention_heads),
    ):
        if size % HEAD_MULTIPLE or size > LARGEST_HEAD:
            rule = (
                f"makes attention heads {size} wide, but in bfloat16 CUDA's kernels take multiples of "
                f"{HEAD_MULTIPLE} up to {LARGEST_HEAD}"
            )
            found.append(Problem(key, value, rule, "choose a size that they take, or train.dtype=float32"))
    return found


def divisors(number: int) -> str:
    """The divisors of a number, for a remedy; the largest few of a number that has many."""
    every = [str(n) for n in range(1, number + 1) if number % n == 0]
    return ", ".join(every if len(every) <= 12 else ["...", *every[-12:]])


RULES: tuple[Callable[..., list[Problem]], ...] = (
    pipeline_divides_ranks,
    layers_fill_pipeline,
    experts_divide,
    overlap_has_experts,
    batches_divide,
    schedule_fits_run,
    reads_end_before_stalls,
    context_fits_rope,
    kernels_fit_a_gpu,
    transformer_engine_has_cuda,
    attention_takes_heads,
    *context_checks.RULES,
    *data_checks.RULES,
    *dispatcher_checks.RULES,
    *reinforcement_checks.RULES,
)
