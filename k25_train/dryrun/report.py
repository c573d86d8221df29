"""The dry run as a table, as lines of text and as JSON."""

from collections.abc import Iterable

from rich import box
from rich.table import Table

from k25_train.config.cluster import Device
from k25_train.config.optimizer import OptimizerOffload
from k25_train.config.parts import ModelPart
from k25_train.config.schema import Config
from k25_train.config.vision import VisionPart
from k25_train.dryrun.dry_run import DryRun, StageSummary
from k25_train.dryrun.tensors import PARTS
from k25_train.plan.report.text import format_layers
from k25_train.units import GIB, format_count


def stage_table(config: Config, result: DryRun) -> Table:
    """One row per stage, the fullest marked, and the totals of the job."""
    title = f"{config.model.name} on {config.world_size:,} ranks: {format_sizes(config)}"
    table = Table(title=title, title_justify="left", show_footer=True, box=box.SIMPLE_HEAD, padding=0)
    stages = result.stages
    table.add_column("stage", footer="all", no_wrap=True)
    table.add_column("layers", no_wrap=True)
    for part in PARTS:
        total = sum(stage.parameters[part] for stage in stages)
        header = part.replace(", ", ",\n")
        table.add_column(header, footer=format_count(total), justify="right", no_wrap=True)
    sums = (
        ("weights", sum(stage.weights_bytes for stage in stages) * config.dp_cp),
        ("gradients", sum(stage.gradients_bytes for stage in stages) * config.dp_cp),
        ("optimizer", sum(sum(stage.optimizer_bytes) for stage in stages)),
    )
    for name, total in (*sums, ("rank", sum(total for _, total in sums))):
        table.add_column(f"{name}\nGiB", footer=format_gib(total), justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    fullest = fullest_stage(result)
    for stage in stages:
        row = (stage.weights_bytes, stage.gradients_bytes, max(stage.optimizer_bytes), stage.rank_bytes)
        table.add_row(
            str(stage.stage),
            " | ".join(format_layers(layers) for layers in stage.layers),
            *(format_count(stage.parameters[part]) if stage.parameters[part] else "" for part in PARTS),
            *(format_gib(number) for number in row),
            "◄" if stage is fullest else "",
        )
    return table


def format_sizes(config: Config) -> str:
    """The parallel sizes in one line."""
    cut = config.parallelism
    shared = f", cp {cut.cp}" if cut.cp > 1 else ""
    return f"pp {cut.pp}, vpp {cut.vpp}, ep {cut.ep}{shared}, dp {config.dp} (experts {config.expert_dp})"


def format_gib(num_bytes: int) -> str:
    """Bytes in GiB, to three or four digits."""
    size = num_bytes / GIB
    return f"{size:,.0f}" if size >= 1000 else f"{size:.2f}" if size >= 1 else f"{size:.5f}"


def fullest_stage(result: DryRun) -> StageSummary:
    """The first stage that has a rank with the most bytes."""
    return max(result.stages, key=lambda stage: stage.rank_bytes)


def note_lines(config: Config) -> Iterable[str]:
    """How to read the table, and where what was built differs from what will run."""
    yield (
        "Parameters are a stage's, each counted once; GiB are those of its fullest rank (◄ of all ranks), "
        "without activations. The last row sums over all stages and, for GiB, over all ranks."
    )
    placement = config.vision_placement
    if placement.encoder_parts:
        what = "vision" if VisionPart.projector in placement.encoder_parts else "the vision tower"
        yield (
            f"dep.mode=decoupled: every rank has a replica of {what}; "
            "its bytes are in every row, its parameters in the first."
        )
    if frozen := [part.value for part in ModelPart if part not in config.optim.trained]:
        yield f"Not trained: {', '.join(frozen)}. What is frozen has neither gradients nor optimizer state."
    if config.train.transformer_engine:
        yield (
            "train.transformer_engine=true: built with megatron-core's own layers, whose weights have "
            "the same shapes; Transformer Engine's Adam keeps 4 bytes less per tensor."
        )
    if config.cluster.device is Device.cuda:
        yield "cluster.device=cuda: no GPU was used, nor any memory for tensors."
    if config.optim.offload is OptimizerOffload.cpu:
        yield "optim.offload=cpu: the optimizer's GiB are in host memory."


def summary_line(config: Config, result: DryRun) -> str:
    """The outcome of a dry run without problems."""
    total = sum(sum(stage.parameters.values()) for stage in result.stages)
    fullest = fullest_stage(result)
    rank = fullest.stage * config.dp_cp + fullest.fullest_dp_rank
    rank_gib = format_gib(fullest.rank_bytes)
    return (
        f"OK: {total:,} parameters, each built once, as the configuration counts; groups, buckets and shards "
        f"of {config.world_size:,} ranks fit; {config.num_micro_batches:,} micro-batches per step.\n"
        f"Fullest is rank {rank}, stage {fullest.stage}: {rank_gib} GiB before activations."
    )


def as_dict(config: Config, result: DryRun) -> dict:
    """All numbers, for JSON."""
    return {
        "model": config.model.name,
        "world_size": config.world_size,
        "num_micro_batches": config.num_micro_batches,
        "parameters": sum(sum(stage.parameters.values()) for stage in result.stages),
        "stages": [
            {
                "stage": stage.stage,
                "layers": [list(layers) for layers in stage.layers],
                "parameters": stage.parameters,
                "weights_bytes": stage.weights_bytes,
                "gradients_bytes": stage.gradients_bytes,
                "optimizer_bytes_by_dp_rank": list(stage.optimizer_bytes),
                "num_buckets": stage.num_buckets,
                "largest_bucket_bytes": stage.largest_bucket_bytes,
                "num_warmup_passes": stage.num_warmup_passes,
            }
            for stage in result.stages
        ],
        "problems": [problem._asdict() for problem in result.problems],
    }
