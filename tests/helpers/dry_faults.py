"""Faults for the dry run to find: each function permanently breaks one thing that a rank builds."""

from typing import Any

import torch

from tests.helpers.dry_runs import wrap


def drop_a_layer() -> None:
    """The second chunk begins a layer too late: one layer is nobody's, and all from there on shift."""
    from parallel.pipeline.layout import PipelineLayout

    layer_ids = PipelineLayout.layer_ids

    def shifted(self: PipelineLayout, pp_rank: int, vp_stage: int) -> range:
        layers = layer_ids(self, pp_rank, vp_stage)
        late = self.chunk_index(pp_rank, vp_stage) == 1
        return range(layers.start + 1, layers.stop) if late else layers

    PipelineLayout.layer_ids = shifted  # type: ignore[method-assign]


def embed_in_every_first_chunk() -> None:
    """Every stage's first chunk gets an embedding and a tower."""
    from parallel.pipeline.layout import PipelineLayout

    PipelineLayout.is_first = lambda self, pp_rank, vp_stage: vp_stage == 0  # type: ignore[method-assign]


def share_experts_wrongly() -> None:
    """Every rank takes the first experts for its own."""
    from k25_train.dryrun import tensors
    from k25_train.model.weights import ChunkPlace

    wrap(tensors, "chunk_place", lambda place: ChunkPlace(place.first_layer, first_expert=0))


def order_ranks_differently() -> None:
    """Pipeline neighbours become neighbours in rank."""
    from megatron.core import parallel_state

    initialize = parallel_state.initialize_model_parallel

    def other_order(*args: Any, **kwargs: Any) -> None:
        initialize(*args, order="tp-cp-pp-ep-dp", **kwargs)

    parallel_state.initialize_model_parallel = other_order


def form_groups_in_another_order() -> None:
    """The last stage forms a group that the others do not."""
    import torch.distributed as dist

    from k25_train.dryrun import rank

    build = rank.build_topology

    def one_more(*args: Any, **kwargs: Any) -> Any:
        if dist.get_rank() > 0:
            dist.new_group([0, 1], group_desc="SURPLUS")
        return build(*args, **kwargs)

    rank.build_topology = one_more


def widen_the_dense_layer() -> None:
    """The model is built with another width than the configuration has."""
    from k25_train.dryrun import rank

    original = rank.backbone_config

    def wider(model: Any, *args: Any) -> Any:
        config = original(model, *args)
        config.ffn_hidden_size += 8
        return config

    rank.backbone_config = wider


def build_in_float32() -> None:
    """Weights are of another format than train.dtype."""
    from k25_train.dryrun import rank

    def in_float32(model: Any) -> Any:
        for chunk in model.chunks:
            chunk.float()
        return model

    wrap(rank, "build_model", in_float32)


def add_an_unknown_parameter() -> None:
    """The model has a weight that the checkpoint has no name for, and of another format than the others."""
    from k25_train.optim import build
    from k25_train.parameters.update_rules import ParameterRule

    rule_of = build.rule_of

    def as_a_norm(name: str, *args: Any) -> ParameterRule:
        norm = "language_model.decoder.final_layernorm.weight"
        return rule_of(norm if name == "language_model.scale" else name, *args)

    build.rule_of = as_a_norm
    add_a_parameter_without_a_rule()


def add_a_parameter_without_a_rule() -> None:
    """The model has a weight that nobody has said how to update."""
    from k25_train.dryrun import rank

    def with_scale(model: Any) -> Any:
        for chunk in model.chunks:
            chunk.language_model.scale = torch.nn.Parameter(torch.ones(4, device="meta"))
        return model

    wrap(rank, "build_model", with_scale)


def freeze_a_parameter() -> None:
    """A weight that should learn has no gradient."""
    from k25_train.dryrun import rank

    def freeze(model: Any) -> Any:
        model.chunks[0].language_model.decoder.layers[0].input_layernorm.weight.requires_grad_(False)
        return model

    wrap(rank, "build_model", freeze)


def freeze_the_encoder() -> None:
    """A tower that should learn has no gradient."""
    from k25_train.dryrun import rank

    def freeze(model: Any) -> Any:
        for encoder in model.encoders:
            encoder.requires_grad_(False)
        return model

    wrap(rank, "build_model", freeze)


def _buffer_of(built: Any) -> Any:
    return built.chunks[0].buffers[0]


def cut_buckets_unevenly() -> None:
    """A bucket ends one element too early for its ranks."""
    from k25_train.dryrun import dry_run

    def cut(built: Any) -> Any:
        start, end = _buffer_of(built).bucket_indices[-1]
        _buffer_of(built).bucket_indices[-1] = (start, end - 1)
        return built

    wrap(dry_run, "build_rank", cut)


def lay_parameters_over_each_other() -> None:
    """The place of one parameter in the buffer begins within another."""
    from k25_train.dryrun import dry_run

    def shift(built: Any) -> Any:
        places = _buffer_of(built).param_index_map
        parameter = next(iter(reversed(places)))
        start, end, bucket = places[parameter]
        places[parameter] = (start - 100, end - 100, bucket)
        return built

    wrap(dry_run, "build_rank", shift)


def leave_the_last_shard_to_nobody() -> None:
    """The last rank of each group updates nothing."""
    from k25_train.dryrun import optimizer_shards

    original = optimizer_shards.shard_ranges

    def without_last(buffer: Any, index: int, num_shards: int) -> Any:
        return [] if index == num_shards - 1 > 0 else original(buffer, index, num_shards)

    optimizer_shards.shard_ranges = without_last


def forget_a_master() -> None:
    """The optimizer does not update one of its shards."""
    from k25_train.dryrun import rank

    def forget(assembled: Any) -> Any:
        next(iter(rank.inner_optimizers(assembled.optimizer))).param_groups[0]["params"].pop()
        return assembled

    wrap(rank, "assemble", forget)


def skip_a_micro_batch() -> None:
    """The interleaved schedule leaves its last pass out."""
    from k25_train.dryrun import dry_run

    wrap(dry_run, "get_schedule_table", lambda order: order[:-1])


def warm_up_late() -> None:
    """Later stages run more forward passes ahead than earlier ones: they would wait for each other."""
    import torch.distributed as dist

    from k25_train.dryrun import rank

    wrap(rank, "get_pp_rank_microbatches", lambda counts: (counts[0], counts[1], dist.get_rank(), counts[3]))


def leave_sequences_over() -> None:
    """A step has one sequence more than its micro-batches take."""
    from k25_train.compose import resolve

    def one_more(config: Any) -> Any:
        config.train.global_batch_size += 1
        return config

    wrap(resolve, "compose", one_more)
