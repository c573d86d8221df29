"""Legal configurations drawn at random, and every way to break one rule of one.

A break takes a legal configuration and returns what to override, the key that is to blame, and words of the
rule that is broken.
"""

from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st

from tests.helpers.illegal_clusters import CLUSTER_BREAKS
from tests.helpers.illegal_contexts import CONTEXT_BREAKS
from tests.helpers.illegal_dispatchers import DISPATCHER_BREAKS
from tests.helpers.illegal_reinforcement import REINFORCEMENT_BREAKS
from tests.helpers.illegal_schedules import SCHEDULE_BREAKS
from tests.helpers.illegal_sources import SOURCE_BREAKS
from tests.helpers.legal_config import Broken, Legal, Values


def divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


@st.composite
def legal_values(draw: st.DrawFn) -> Values:
    """Overrides of `experiment=smoke` that break no rule: sizes, batches, overlaps and layouts vary."""
    pp = draw(st.sampled_from([1, 2, 3, 4, 8, 16]))
    vpp = draw(st.integers(1, 4)) if pp > 1 else 1
    dp = draw(st.integers(1, 8))
    ep = draw(st.sampled_from(divisors(dp)))
    nodes = draw(st.sampled_from(divisors(pp * dp)))
    num_layers = draw(st.integers(max(1, pp * vpp - 2), pp * vpp + 8))
    micro_batch_size = draw(st.integers(1, 4))
    unit = micro_batch_size * dp
    fewest = pp if vpp > 1 else 1
    num_micro_batches = draw(st.integers(fewest, 3 * pp + 1))
    overlap = ep > 1 and (pp == 1 or vpp > 1) and num_micro_batches > 1 and draw(st.booleans())
    reduce = draw(st.booleans())
    warmup, decay = draw(st.integers(0, 20)), draw(st.integers(0, 20))
    return {
        "cluster.nodes": nodes,
        "cluster.gpus_per_node": pp * dp // nodes,
        "parallelism.pp": pp,
        "parallelism.vpp": vpp,
        "parallelism.ep": ep,
        "parallelism.layout": draw(st.none() | written_layouts(num_layers, pp * vpp)),
        "parallelism.overlap_expert_comm": overlap,
        "parallelism.delay_wgrad": overlap and draw(st.booleans()),
        "parallelism.overlap_grad_reduce": reduce,
        "parallelism.overlap_param_gather": reduce and draw(st.booleans()),
        "model.num_layers": num_layers,
        "model.num_dense_layers": draw(st.integers(0, min(3, num_layers - 1))),
        "model.num_experts": ep * draw(st.integers(3 if ep == 1 else 2, 4)),
        "train.micro_batch_size": micro_batch_size,
        "train.global_batch_size": num_micro_batches * unit,
        "train.eval_sequences": 2 * fewest * unit,
        "train.seq_len": draw(st.sampled_from([64, 256, 1024])),
        "optim.warmup": warmup,
        "optim.decay": decay,
        "train.steps": max(1, warmup + decay + draw(st.integers(0, 5))),
    }


@st.composite
def written_layouts(draw: st.DrawFn, num_layers: int, num_chunks: int) -> str:
    """A layout string; chunks may be without layers."""
    cuts = draw(
        st.lists(st.integers(0, num_layers), min_size=num_chunks - 1, max_size=num_chunks - 1).map(sorted)
    )
    ends = [0, *cuts, num_layers]
    chunks = ["t" * (ends[i + 1] - ends[i]) for i in range(num_chunks)]
    return "E" + "|".join(chunks) + "L"


def value(key: str, wrong: Sequence[Any], rule: str) -> Callable[[Legal], Broken]:
    """A value that is wrong by itself."""
    return lambda legal: ({key: legal.pick(wrong)}, key, rule)


def nested(section: str, wrong: Values, key: str, rule: str) -> Callable[[Legal], Broken]:
    """A key of a section that is null otherwise."""
    return lambda _legal: ({section: wrong}, f"{section}.{key}", rule)


def values(rule: str, wrong: Sequence[Any], *keys: str) -> dict[str, Callable[[Legal], Broken]]:
    """The same rule of several keys."""
    return {f"{key} {rule}": value(key, wrong, rule) for key in keys}


def grouped(key: str, wrong: Sequence[Any], rule: str) -> Callable[[Legal], Broken]:
    """The same where attention is grouped."""
    plain = {
        "kv_lora_rank": None,
        "q_lora_rank": None,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "qk_nope_head_dim": 0,
        "qk_rope_head_dim": 32,
        "v_head_dim": 32,
    }

    def broken(legal: Legal) -> Broken:
        changes = {f"model.{name}": each for name, each in plain.items()}
        return changes | {key: legal.pick(wrong)}, key, rule

    return broken


def interleaved_alone(legal: Legal) -> Broken:
    changes = {"parallelism.pp": 1, "parallelism.vpp": legal.pick([2, 3, 4])}
    return changes, "parallelism.vpp", "needs a pipeline"


def overlap_without_experts(_legal: Legal) -> Broken:
    changes = {"parallelism.overlap_expert_comm": True, "parallelism.ep": 1}
    return changes, "parallelism.overlap_expert_comm", "needs experts spread over ranks"


def overlap_without_virtual_stages(legal: Legal) -> Broken:
    changes = {
        "parallelism.overlap_expert_comm": True,
        "parallelism.pp": legal.pick([2, 4]),
        "parallelism.vpp": 1,
    }
    return changes, "parallelism.overlap_expert_comm", "needs virtual stages in a pipeline"


def delay_without_overlap(_legal: Legal) -> Broken:
    changes = {"parallelism.overlap_expert_comm": False, "parallelism.delay_wgrad": True}
    return changes, "parallelism.delay_wgrad", "needs overlap_expert_comm=true"


def gather_without_reduce(_legal: Legal) -> Broken:
    changes = {"parallelism.overlap_grad_reduce": False, "parallelism.overlap_param_gather": True}
    return changes, "parallelism.overlap_param_gather", "needs overlap_grad_reduce=true"


def overlap_with_one_micro_batch(legal: Legal) -> Broken:
    ranks = legal.pick([2, 4])
    changes = {
        "cluster.nodes": 1, "cluster.gpus_per_node": ranks, "parallelism.pp": 1, "parallelism.vpp": 1,
        "parallelism.ep": ranks, "parallelism.layout": None, "parallelism.overlap_expert_comm": True,
        "model.num_experts": 8, "train.global_batch_size": ranks * legal["train.micro_batch_size"],
    }  # fmt: skip
    return changes, "train.global_batch_size", "runs one micro-batch concurrently with another"


OFFLOADED: Values = {
    "cluster.nodes": 1, "cluster.gpus_per_node": 2, "parallelism.pp": 2, "parallelism.vpp": 2,
    "parallelism.ep": 1, "parallelism.layout": None, "parallelism.overlap_expert_comm": False,
    "parallelism.delay_wgrad": False, "model.num_layers": 6, "train.micro_batch_size": 1,
    "train.global_batch_size": 8, "train.eval_sequences": 4, "activation.norm.input": "offload",
}  # fmt: skip
"""A legal configuration that offloads something."""


def gpu_without_memory(_legal: Legal) -> Broken:
    return {"cluster.device": "cuda"}, "cluster.rates.memory_gb", "must be given where cluster.device is cuda"


def host_memory_below_what_is_offloaded(legal: Legal) -> Broken:
    changes = OFFLOADED | {"activation.host_gib": legal.pick([1e-9, 1e-7])}
    return changes, "activation.host_gib", "so much in the host at a time"


def node_without_memory(legal: Legal) -> Broken:
    changes = OFFLOADED | {"activation.host_gib": 64, "cluster.host_memory_gib": legal.pick([1, 127.5])}
    return changes, "activation.host_gib", "GiB on a node of 2 ranks"


def too_few_micro_batches(name: str) -> Callable[[Legal], Broken]:
    def broken(legal: Legal) -> Broken:
        pp, dp = legal.pick([3, 4, 8]), legal.pick([1, 2])
        changes = {
            "cluster.nodes": 1, "cluster.gpus_per_node": pp * dp, "parallelism.pp": pp, "parallelism.vpp": 2,
            "parallelism.ep": 1, "parallelism.layout": None, "parallelism.overlap_expert_comm": False,
            "parallelism.delay_wgrad": False, "model.num_layers": 2 * pp, "train.micro_batch_size": 1,
            "train.global_batch_size": pp * dp, "train.eval_sequences": 2 * pp * dp,
        }  # fmt: skip
        return changes | {name: 2 * dp}, name, "each of the pp ranks starts on its own micro-batch"

    return broken


def indivisible_batch(name: str) -> Callable[[Legal], Broken]:
    def broken(legal: Legal) -> Broken:
        size = 3 * legal.dp
        wrong = legal[name] * size + legal.pick([2] if name == "train.eval_sequences" else range(1, size))
        return {"train.micro_batch_size": 3, name: wrong}, name, f"must be a multiple of {size} "

    return broken


def pipeline_that_divides_nothing(legal: Legal) -> Broken:
    wrong = [pp for pp in range(2, legal.world_size + 3) if legal.world_size % pp]
    return {"parallelism.pp": legal.pick(wrong)}, "parallelism.pp", "must divide the"


def layers_that_fill_nothing(legal: Legal) -> Broken:
    pp, vpp = legal.pick([2, 4, 8]), legal.pick([3, 4])
    changes = {
        "cluster.nodes": 1, "cluster.gpus_per_node": pp * legal["parallelism.ep"], "parallelism.pp": pp,
        "parallelism.vpp": vpp, "parallelism.layout": None, "model.num_dense_layers": 1,
        "model.num_layers": legal.pick(range(1, pp * vpp - 2)),
    }  # fmt: skip
    return changes, "parallelism.pp", "need a layer, so"


def layout_that_does_not_add_up(legal: Legal) -> Broken:
    num_layers, num_chunks = legal["model.num_layers"], legal["parallelism.pp"] * legal["parallelism.vpp"]
    layout = "E" + "t" * num_layers + "|" * (num_chunks - 1) + "L"
    wrong = [
        layout + "|", layout.replace("t", "", 1), "t" + layout, layout[1:], layout[:-1], f"{layout}m", "",
    ]  # fmt: skip
    return {"parallelism.layout": legal.pick(wrong)}, "parallelism.layout", "chunks separated by"


def experts_that_do_not_divide(legal: Legal) -> Broken:
    ep = legal.pick([2, 3, 4])
    changes = {
        "cluster.nodes": 1, "cluster.gpus_per_node": legal["parallelism.pp"] * ep, "parallelism.ep": ep,
        "model.num_experts": ep * legal.pick([2, 3]) + legal.pick(range(1, ep)),
    }  # fmt: skip
    return changes, "parallelism.ep", "must divide model.num_experts"


def expert_groups_beyond_replicas(legal: Legal) -> Broken:
    wrong = [ep for ep in range(2, legal.dp + 4) if legal.dp % ep]
    ep = legal.pick(wrong)
    changes = {"parallelism.ep": ep, "model.num_experts": 2 * ep}
    return changes, "parallelism.ep", f"must divide the {legal.dp} ranks of a stage"


def schedule_longer_than_the_run(legal: Legal) -> Broken:
    changes = {"optim.warmup": legal.pick([0, 5]), "optim.decay": legal.pick([9, 12])}
    changes["train.steps"] = legal.pick(range(1, sum(changes.values())))
    return changes, "train.steps", "must leave room for optim.warmup"


def split_in_bubbles(legal: Legal) -> Broken:
    return {"dep.split_items": True, "dep.schedule": "bubbles"}, "dep.split_items", "needs schedule=upfront"


def heads_for_cuda(legal: Legal) -> Broken:
    on_cuda = {"cluster.device": "cuda", "cluster.rates.memory_gb": 80.0, "train.dtype": "bfloat16"}
    changes = on_cuda | {"model.v_head_dim": legal.pick([12, 14])}
    return changes, "model.v_head_dim", "CUDA's kernels take multiples of 8"


POSITIVE = (
    "parallelism.pp parallelism.vpp parallelism.ep parallelism.cp model.num_layers model.num_experts "
    "model.vocab_size model.rope.theta model.vision.patch_size optim.lr optim.grad_clip train.steps "
    "train.seq_len train.global_batch_size train.micro_batch_size train.eval_sequences train.eval_interval "
    "train.stall_timeout_s checkpoint.keep checkpoint.writers cluster.nodes cluster.gpus_per_node "
    "data.limit_samples data.sources.text.epochs data.read_timeout_s data.cache_gib "
    "data.requests_per_s optim.qk_clip_threshold optim.qk_clip_interval "
    "optim.muon.newton_schulz_steps optim.muon.update_rms optim.muon.exchange_mib "
    "optim.mm_projector.lr_scale optim.vision_tower.grad_clip train.batch_ramp.increment "
    "dep.max_patches_per_chunk cluster.rates.bf16_tflops cluster.network_gb_per_s cluster.host_copy_gb_per_s "
    "cluster.host_memory_gib cluster.rates.memory_gb metrics.weight_norm_interval metrics.alarms.loss_spike"
).split()
NOT_NEGATIVE = (
    "model.num_dense_layers model.balance_loss_coeff model.expert_bias_update_rate optim.min_lr "
    "optim.weight_decay optim.start_lr optim.max_skipped_steps "
    "data.prefetch_steps data.workers data.sources.text.weight data.sources.text.heldout train.seed "
    "dep.feature_buffer_gib checkpoint.keep_every"
).split()

_TEXT_ALONE = {f"data.sources.{name}.kinds": "[text]" for name in ("caption", "ocr", "video")}

BREAKS: dict[str, Callable[[Legal], Broken]] = {
    **values("must be positive", [0, -1, -64], *POSITIVE),
    **values("must not be negative", [-1, -7], *NOT_NEGATIVE),
    **values("must be a whole number", ["many", 1.5, None, True], "train.steps", "parallelism.pp"),
    **values("a number of steps of at least 1", [0, -3, "'1.5'"], "checkpoint.interval"),
    **values("or a time with its unit", ["soon", "5 days", "0min", 1.5], "checkpoint.local_interval"),
    **values("must be one of", ["half", None], "checkpoint.verify"),
    **values("no file is named", ["['a*']"], "checkpoint.init_fresh", "checkpoint.init_leave_out"),
    **values("is not a part of the model", ["a"], "checkpoint.init_parts.tower"),
    **values("must be true or false", ["maybe", 1.5, None], "parallelism.delay_wgrad", "data.shuffle"),
    **values("must be one of", ["float8", None], "train.dtype", "cluster.device", "optim.offload"),
    **values("must be one of", ["sgd", None], "optim.language_model.name", "optim.vision_tower.name"),
    **values("must be one of", ["exact", "custom"], "optim.muon.newton_schulz_coefficients"),
    **values("must be a finite number", [".nan", ".inf", "fast"], "optim.lr"),
    **values("is not a key of", [1, "x"], "train.stpes", "parallelism.tp", "trian"),
    **values("must be given", ["???"], "train.seq_len", "parallelism.ep"),
    **values("is a section, not a value", [3, "x"], "model.rope", "checkpoint"),
    **values("must name a folder", ["''"], "data.dir", "run.dir"),
    **values("starts with ~", ["~/x"], "data.dir", "data.tokenizer", "run.dir"),
    **values("is a URL", ["s3://bucket/run"], "run.dir"),
    **values("must be even", [15, 17], "model.qk_nope_head_dim", "model.qk_rope_head_dim"),
    **values("must be even", [7, 31], "train.eval_sequences"),
    **values("must be a multiple of 8", [100, 130], "model.hidden_size", "model.expert_ffn_hidden_size"),
    "inputs of an INT4 expert": lambda legal: (
        {"model.quantization": "int4_qat", "model.expert_ffn_hidden_size": legal.pick([16, 40, 104])},
        "model.expert_ffn_hidden_size",
        "must be a multiple of 32 with int4_qat",
    ),
    "INT4 without experts": lambda legal: (
        {"model.quantization": "int4_qat", "model.num_dense_layers": legal.values["model.num_layers"]},
        "model.quantization",
        "of which there are none",
    ),
    **values("must lie in [0, 1)", [1, 2, -0.5], "optim.beta1", "optim.beta2", "optim.muon.momentum"),
    **values("room for one merged token", [1, 3], "model.vision.image_patch_limit"),
    **values("is not a kind of sample", ["[vidoe]"], "data.sources.text.kinds"),
    **values("must name files or a folder", ["''"], "data.sources.text.path"),
    **values("must be between 0 and 1", [0, 1, -0.5], "data.vision_ratio"),
    "zero vision of images": lambda legal: (
        {"data.zero_vision": True},
        "data.sources.caption.kinds",
        "has images or video, and data.zero_vision refuses them",
    ),
    "zero vision at a ratio": lambda legal: (
        {**_TEXT_ALONE, "data.zero_vision": True, "data.vision_ratio": 0.5},
        "data.vision_ratio",
        "must be null with data.zero_vision",
    ),
    "zero vision of a trained tower": lambda legal: (
        {**_TEXT_ALONE, "data.zero_vision": True, "optim.vision_tower.trained": True},
        "optim.vision_tower.trained",
        "must be false with data.zero_vision",
    ),
    **values("must be a whole number of samples, or", [-1, 1.5], "data.max_skipped_samples"),
    **values("must be at least 0 and below 1", [-1, 1], "data.augment.flip", "data.augment.crop"),
    "v_head_dim": value("model.v_head_dim", [64, 48], "must not exceed qk_nope_head_dim"),
    "experts of a token": value("model.num_experts_per_token", [99, 200], "must not exceed num_experts"),
    "query rank": value("model.q_lora_rank", [0, -24], "must be positive, or null"),
    "latent heads": value("model.num_key_value_heads", [1, 4], "must be null with latent attention"),
    "groups": grouped("model.num_key_value_heads", [3, 0, None], "must divide num_attention_heads"),
    "grouped query rank": grouped("model.q_lora_rank", [8, 64], "must be null where kv_lora_rank is"),
    "grouped values": grouped("model.v_head_dim", [16, 64], "must be qk_nope_head_dim + qk_rope_head_dim"),
    "dense layers": value("model.num_dense_layers", [99, 500], "must not exceed num_layers"),
    "rope scaling": value("model.rope.scaling_factor", [0.5, 0], "must be 1.0 (plain RoPE) or more"),
    "rope frequencies": value("model.rope.beta_fast", [0.5, 0.9], "must not lie below beta_slow"),
    "vision heads": value("model.vision.hidden_size", [100, 97], "must be a multiple of 4 x num_attention"),
    "merge": value("model.vision.merge_size", [1, 3], "must be 2"),
    "side limit": value("model.vision.side_patch_limit", [513, 900], "must not exceed rope_max_grid"),
    "lowest rate": value("optim.min_lr", [1.0, 7.5], "must not exceed lr"),
    **SCHEDULE_BREAKS,
    "context": value("train.seq_len", [1025, 8192], "must not exceed rope.original_max_position"),
    "Transformer Engine": value("train.transformer_engine", [True], "needs cluster.device=cuda"),
    "step of the timeline": value("train.trace_step", [0, -3, 10**6], "must be a step of the run"),
    "heads for CUDA": heads_for_cuda,
    "alarm below what is usual": value("metrics.alarms.grad_spike", [1, 0.5, -2], "must be greater than 1"),
    "project without a name": nested("metrics.wandb", {"project": "' '"}, "project", "must not be empty"),
    "user of a server": nested(
        "metrics.mlflow",
        {"uri": "'http://a:b@h'", "experiment": "x"},
        "uri",
        "holds a name or a password",
    ),
    **SOURCE_BREAKS,
    "split in bubbles": split_in_bubbles,
    "interleaved alone": interleaved_alone,
    "overlap without experts": overlap_without_experts,
    "overlap without virtual stages": overlap_without_virtual_stages,
    "overlap with one micro-batch": overlap_with_one_micro_batch,
    "delay without overlap": delay_without_overlap,
    "gather without reduce": gather_without_reduce,
    "exchange alone": value("parallelism.cp_exchange", ["ring", "all_gather"], "is for ranks that share"),
    "too few micro-batches": too_few_micro_batches("train.global_batch_size"),
    "too few to evaluate": too_few_micro_batches("train.eval_sequences"),
    "indivisible batch": indivisible_batch("train.global_batch_size"),
    "indivisible evaluation": indivisible_batch("train.eval_sequences"),
    "pipeline": pipeline_that_divides_nothing,
    "layers": layers_that_fill_nothing,
    "layout": layout_that_does_not_add_up,
    "experts": experts_that_do_not_divide,
    "expert groups": expert_groups_beyond_replicas,
    "schedule": schedule_longer_than_the_run,
    "GPU without memory": gpu_without_memory,
    "host memory": host_memory_below_what_is_offloaded,
    "memory of a node": node_without_memory,
    **CLUSTER_BREAKS,
    **CONTEXT_BREAKS,
    **DISPATCHER_BREAKS,
    **REINFORCEMENT_BREAKS,
}
"""Name -> break; tests/unit/compose/test_illegal_configs.py finds every rule of the configuration in it."""


def as_arguments(overrides: Values) -> list[str]:
    """Overrides as written on a command line."""
    return [f"{key}={argument(key, given)}" for key, given in overrides.items()]


def argument(key: str, given: Any) -> str:
    """A value as hydra reads it."""
    if given is None:
        return "null"
    if isinstance(given, dict):
        return "{" + ", ".join(f"{name}: {argument(name, inner)}" for name, inner in given.items()) + "}"
    if isinstance(given, list):
        return "[" + ", ".join(argument(key, inner) for inner in given) + "]"
    return f"'{given}'" if key in ("parallelism.layout", "partition") else str(given)
