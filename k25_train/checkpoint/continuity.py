"""Whether a configuration may resume from a checkpoint: the keys that the training up to it depends on."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from k25_train.checkpoint import folders
from k25_train.checkpoint.storage.kinds import Place
from k25_train.checkpoint.storage.places import storage_of
from k25_train.compose.migrations import migrate
from k25_train.compose.resolve import to_yaml
from k25_train.compose.yaml_files import read_text
from k25_train.config.leaves import leaves
from k25_train.config.schema import Config
from k25_train.errors import CheckpointError, ConfigError

SAME_MODEL = ("model",)
"""Sections that must be unchanged for the weights to mean the same."""
OF_COMPUTATION = ("model.quantization",)
"""Keys of the model that say how its weights are computed with: an evaluation may choose."""
NOT_OF_WEIGHTS = (
    *OF_COMPUTATION,
    "model.name",
    "model.init_std",
    "model.balance_loss_coeff",
    "model.expert_bias_update_rate",
    "model.vision.image_patch_limit",
    "model.vision.side_patch_limit",
    "model.vision.frame_patch_limit",
    "model.vision.video_fps",
)
"""Keys of the model that an import has from nobody: they are of training and of the data alone."""
SAME_RUN = (
    *SAME_MODEL,
    "optim.language_model.name",
    "optim.language_model.trained",
    "optim.vision_tower.name",
    "optim.vision_tower.trained",
    "optim.mm_projector.name",
    "optim.mm_projector.trained",
    "data.sources.*.format",
    "data.sources.*.kinds",
    "data.sources.*.heldout",
    "data.decoder",
    "data.augment",
    "data.shuffle",
    "data.limit_samples",
    "train.seq_len",
    "train.global_batch_size",
    "train.batch_ramp",
    "train.seed",
    "train.dtype",
    "environment.epochs",
    "environment.tasks",
    "rollout.manager.max_turns",
    "rollout.manager.max_observation_tokens",
    "algorithm.prompts_per_step",
    "algorithm.group_size",
    "algorithm.steps_per_rollout",
    "rollout.max_prompt_tokens",
    "rollout.max_tokens",
    "rollout.temperature",
    "rollout.judge_model",
    "rollout.judge_version",
)
"""Keys that must be unchanged for the next step to be the one that an uninterrupted run would take, except
for the learning rate and other hyperparameters of the optimizer, and for the mixture of the data, which may
change during a run. `*` is any name: what has one may come and go, and is compared while it is there."""
MAY_CHANGE = {
    "every layout trains the same model": (
        "parallelism",
        "dep",
        "cluster",
        "derived",
        "train.micro_batch_size",
    ),
    "how tensors are kept and computed, equal up to rounding": (
        "activation",
        "optim.offload",
        "train.transformer_engine",
        "train.deterministic",
    ),
    "hyperparameters of the optimizer, changed on purpose during a run": (
        "optim.lr",
        "optim.min_lr",
        "optim.beta1",
        "optim.beta2",
        "optim.eps",
        "optim.weight_decay",
        "optim.grad_clip",
        "optim.start_lr",
        "optim.warmup",
        "optim.decay",
        "optim.frozen_expert_bias",
        "optim.qk_clip_threshold",
        "optim.qk_clip_interval",
        "optim.muon",
        "optim.language_model.lr_scale",
        "optim.language_model.grad_clip",
        "optim.vision_tower.lr_scale",
        "optim.vision_tower.grad_clip",
        "optim.mm_projector.lr_scale",
        "optim.mm_projector.grad_clip",
        "train.steps",
        "train.tokens",
    ),
    "where the data are; what they are is compared as facts": (
        "data.dir",
        "data.tokenizer",
        "data.sources.*.path",
        "data.sources.*.index",
    ),
    "what is mixed, changed on purpose during a run: each source goes on where it was": (
        "data.sources.*.weight",
        "data.sources.*.epochs",
        "data.sources.*.licence",
        "data.vision_ratio",
        "data.schedule",
    ),
    "how a policy is trained, changed on purpose during a run": (
        "algorithm.form",
        "algorithm.ratio_low",
        "algorithm.ratio_high",
        "algorithm.ratio_penalty",
        "algorithm.normalize_advantages",
        "algorithm.skip_equal_rewards",
        "algorithm.other_versions",
        "algorithm.ptx_coeff",
        "algorithm.ptx_sequences",
        "algorithm.max_staleness",
        "algorithm.token_cap",
        "algorithm.toggle",
    ),
    "which engine rolls out: its tokens, once there, are what is trained": (
        "rollout.engine",
        "rollout.urls",
        "rollout.weights",
        "rollout.transport",
        "rollout.max_running",
        "rollout.threads",
        "rollout.request_timeout_s",
        "rollout.max_attempts",
        "rollout.judge_timeout_s",
        "rollout.judge_url",
        "rollout.judge_max_tokens",
        "rollout.update_timeout_s",
        "rollout.probe_sequences",
        "rollout.probe_tolerance",
        "rollout.eval_tasks",
        *(
            f"rollout.manager.{name}"
            for name in (
                "placement",
                "shards",
                "max_live",
                "max_sandboxes",
                "kv_low",
                "kv_high",
                "tool_timeout_s",
                "rollout_timeout_s",
                "teardown_timeout_s",
                "stuck_s",
                "max_restarts",
                "gateway_host",
                "gateway_port",
                "status_port",
            )
        ),
        "environment.sandbox",
    ),
    "what is tolerated, prepared, saved, evaluated and told": (
        "optim.max_skipped_steps",
        "data.max_skipped_samples",
        "data.zero_vision",
        "data.prefetch_steps",
        "data.read_in",
        "data.workers",
        "data.read_timeout_s",
        "data.cache_dir",
        "data.cache_gib",
        "data.requests_per_s",
        "train.eval_interval",
        "train.eval_sequences",
        "train.stall_timeout_s",
        "train.trace_step",
        "checkpoint",
        "metrics",
        "run",
    ),
}
"""Why -> keys and sections that a resume may change. Every key is here or in `SAME_RUN`."""

ORIGIN = "init."
"""What facts start with that tell where a run's first weights came from: `init.PART`."""


def check_continuity(folder: Place, config: Config, fixed: Sequence[str], *, but: Sequence[str] = ()) -> None:
    """Compare the keys or sections `fixed`, those of `but` excepted, with the configuration that the
    checkpoint was written with.

    A configuration of an earlier version is brought up to this one first (`compose/migrations.py`), so a key
    that it lacks has the value that earlier code behaved as.

    Raises `CheckpointError` naming every key that differs, both values, and the remedy; `ConfigError` if the
    configuration cannot be read or is of a later version.
    """
    saved = dict(leaves(saved_config(folder / folders.CONFIG)))
    now = dict(leaves(yaml.safe_load(to_yaml(config))))
    changed = [
        f"  {key}={value} in the checkpoint, {now.get(key)} now"
        for key, value in saved.items()
        for name in fixed
        if key not in but and covers(name, key) and now.get(key) != value and (key in now or "*" not in name)
    ]
    if changed:
        raise CheckpointError(
            "\n".join([f"{folder} was trained with another configuration:", *changed])
            + "\n  -> set them back to resume from it, or choose another run.dir to start from scratch"
        )


def covers(name: str, key: str) -> bool:
    """Whether a dotted key is the one of that name, or lies in the section of it; `*` is any part."""
    parts, of_key = name.split("."), key.split(".")
    pairs = zip(parts, of_key, strict=False)
    return len(parts) <= len(of_key) and all(part in ("*", other) for part, other in pairs)


def saved_config(path: Place) -> dict[str, Any]:
    """The values of a saved configuration under the keys of today. Raises `ConfigError` if it is none."""
    # A checkpoint may come from elsewhere: refuses what is no mapping, tags, and aliases that multiply.
    try:
        text = storage_of(path).read(path).removeprefix("\ufeff")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a configuration: {error}") from error
    read_text(text, str(path))
    try:
        return migrate(yaml.safe_load(text)).values
    # The last three are what a migration meets where a section is a value.
    except (ConfigError, yaml.YAMLError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: cannot be read as a configuration: {error}") from error


def check_facts(
    folder: Place, saved: Mapping[str, str], now: Mapping[str, str], *, accept: bool = False
) -> None:
    """Compare what was true of the data that the checkpoint was trained on with what is true now.

    A checkpoint or a caller without facts is not compared. Raises `CheckpointError` naming every fact that
    differs, unless differences are accepted.
    """
    changed = changed_facts(saved, now)
    if changed and not accept:
        raise CheckpointError(
            "\n".join([f"{folder} was trained on other data:", *changed])
            + "\n  -> set data.dir and data.tokenizer to what they were (another place is fine), accept the "
            "change with checkpoint.accept_changed_data=true, or choose another run.dir to start from scratch"
        )


def changed_facts(saved: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """A line for each fact that differs, with both values; none if either side has no facts at all. A source
    that only one of them has is no difference: it was added to the mixture, or left out. What the run's first
    weights were does not count."""
    saved = {key: value for key, value in saved.items() if not key.startswith(ORIGIN)}
    if not saved or not now:
        return []
    common = _sources_of(saved) & _sources_of(now)
    return [
        f"  {key}: {saved.get(key, 'nothing')} in the checkpoint, {now.get(key, 'nothing')} now"
        for key in sorted({*saved, *now})
        if saved.get(key) != now.get(key) and _sources_of([key]) <= common
    ]


def _sources_of(facts: Iterable[str]) -> set[str]:
    """The sources that facts are about, by their keys: `data.train.NAME`, `data.heldout.NAME.content`."""
    parts = (key.split(".") for key in facts)
    return {each[2] for each in parts if each[:2] in (["data", "train"], ["data", "heldout"])}
