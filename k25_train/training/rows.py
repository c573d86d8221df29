"""What `metrics.jsonl` says of a step."""

from collections.abc import Sequence
from dataclasses import asdict

from k25_train.config.schema import Config
from k25_train.data.mix.mixture import mixtures
from k25_train.data.served import figures
from k25_train.metrics.utilisation import peak_of
from k25_train.optim.qk_clip import ClipResult
from k25_train.plan.flops import training_flops
from k25_train.run_folder.rows_file import Value
from k25_train.training.expert_load import ExpertFigures
from k25_train.training.step import StepResult

MetricsRow = dict[str, Value | Sequence[Value]]


def metrics_row(config: Config, step: int, result: StepResult, *, is_mixed_anew: bool) -> MetricsRow:
    """The row of a step; parts that did nothing add no figures. Only the rank that writes it needs it.

    `is_mixed_anew`: the configuration's mixture is drawn from this step on, so it has the weights.
    """
    sizes = result.sizes
    flops = training_flops(config.model, sizes, config.optim.trained)
    return {
        "step": step,
        "loss": result.loss,
        **{f"loss/{source}": loss for source, loss in result.source_losses.items()},
        "grad_norm": result.grad_norm,
        **{f"grad_norm/{part}": norm for part, norm in result.part_grad_norms.items()},
        **{f"weight_norm/{part}": norm for part, norm in result.weight_norms.items()},
        **expert_figures(result.experts),
        "lr": result.learning_rate,
        **batch_figures(config, result),
        "tokens": sizes.num_tokens,
        "text_tokens": sizes.num_tokens - sizes.num_vision_tokens,
        "vision_tokens": sizes.num_vision_tokens,
        "images": sizes.num_items,
        "patches": sizes.num_patches,
        "flops": flops,
        "step_time_s": result.step_time_s,
        "tokens_per_s": sizes.num_tokens / result.step_time_s,
        "tokens_per_s_per_gpu": sizes.num_tokens / result.step_time_s / config.world_size,
        **utilisation(config, flops, result.step_time_s),
        "data_wait_s": result.data_wait_s,
        **{f"data_{name}": count for name, count in result.reads.items() if count},
        **({"pixels_read": result.pixels_read} if config.data.zero_vision else {}),
        **figures(result.served, result.loader_state),
        **weights(config, step, is_mixed_anew=is_mixed_anew),
        **{f"vision_{name}": value for name, value in asdict(result.vision).items()},
        **{f"offload_{name}": value for name, value in asdict(result.offload).items()},
        **{f"memory_{name}": value for name, value in asdict(result.memory).items()},
        **clip_figures(result.clip),
    }


def batch_figures(config: Config, result: StepResult) -> MetricsRow:
    """Sizes of the global batch: sequences and their length, how much of them is padding, and the share of
    the tokens that are of sources with images or video (`data.vision_ratio`)."""
    batch, seq_len = result.num_sequences, config.train.seq_len
    with_media = config.data.with_media
    of_media = sum(each.num_tokens for name, each in result.served.items() if name in with_media)
    return {
        "batch": batch,
        "seq_len": seq_len,
        "padding_share": 1 - result.sizes.num_tokens / (batch * seq_len),
        "vision_ratio": of_media / max(result.sizes.num_tokens, 1),
    }


def utilisation(config: Config, flops: int, step_time_s: float) -> MetricsRow:
    """Share of the devices' peak that the step has reached (MFU); none where they are CPUs."""
    peak = peak_of(config)
    return {"mfu": flops / step_time_s / peak} if peak else {}


def expert_figures(experts: ExpertFigures) -> MetricsRow:
    """Loads and biases of the experts; none where the model has none."""
    if not experts.loads:
        return {}
    return {
        "expert_load": max(experts.loads),
        "expert_loads": [float(f"{load:.4g}") for load in experts.loads],
        "dead_experts": experts.dead,
        "expert_bias": experts.bias,
        "expert_bias_change": experts.bias_change,
    }


def weights(config: Config, step: int, *, is_mixed_anew: bool) -> MetricsRow:
    """`source_weight/NAME` where other weights begin, by the schedule or with another configuration."""
    current = [mixture for mixture in mixtures(config.data) if mixture.first_step <= step][-1]
    if not is_mixed_anew and current.first_step != step:
        return {}
    return {f"source_weight/{name}": weight for name, weight in current.weights.items()}


def clip_figures(clip: ClipResult) -> MetricsRow:
    """Largest logits and clipped heads; none where QK-Clip is off."""
    if not clip.max_logits:
        return {}
    return {
        "max_logit": max(clip.max_logits),
        "heads_clipped": clip.heads_clipped,
        # Rounded, since there are many and a curve needs no more.
        "max_logits": [float(f"{logit:.5g}") for logit in clip.max_logits],
    }
