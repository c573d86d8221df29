"""Saved configurations of earlier versions, brought up to the current one.

A `config.yaml` says with which version of the keys it was written (`config_version`). To add or rename keys:

1. Save a sample of the version before: copy the `config.yaml` of a run into `tests/golden/configs`, and list
   it in `FILLED` of `tests/unit/compose/test_migrations.py`.
2. Append one tuple of `Fill`s, `Rename`s and `Remove`s to `MIGRATIONS`, which raises `VERSION`; the tuples
   before it stay unchanged. A new key is filled in with the value that earlier code behaved as, which need
   not be what `conf/` has.

A key whose meaning others take over goes with `Remove`, behind the `Fill`s that read it.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from k25_train.errors import ConfigError

VERSION_KEY = "config_version"

Values = dict[str, Any]
"""Nested mapping of keys to plain values, as YAML holds it."""


class Migrated(NamedTuple):
    """A saved configuration under the keys of the current version."""

    values: Values
    """Its sections, without the version."""
    notes: list[str]
    """One line for each key that was renamed or filled in."""


@dataclass(frozen=True, slots=True)
class Fill:
    """A key that earlier versions did not have."""

    key: str
    """Dotted name, of a value or of a whole section."""
    value: object
    """What earlier code behaved as, or a function from the configuration to that."""

    def apply(self, values: Values) -> list[str]:
        """Add what is missing; what is there stays, and what is null gets no keys."""
        value = self.value(values) if callable(self.value) else self.value
        section, name = _parent(values, self.key)
        if section is None:
            return []
        if name not in section:
            section[name] = copy.deepcopy(value)
            shown = "section" if isinstance(value, Mapping) else f"{value!r}"
            return [f"{self.key}: {shown} filled in with what earlier versions did"]
        if isinstance(value, Mapping):
            missing = (Fill(f"{self.key}.{key}", each).apply(values) for key, each in value.items())
            return [note for notes in missing for note in notes]
        return []


@dataclass(frozen=True, slots=True)
class Rename:
    """A key that has another name than in earlier versions."""

    old: str
    """Dotted name in earlier versions."""
    new: str
    """Dotted name from this version on."""

    def apply(self, values: Values) -> list[str]:
        """Move the value, and drop a section that is empty without it; what the new name held is replaced."""
        section, name = _parent(values, self.old)
        notes = []
        if section is not None and name in section:
            target, new_name = _parent(values, self.new)
            if target is not None:
                target[new_name] = section.pop(name)
                notes.append(f"{self.old}: is called {self.new} now")
        _drop_empty_sections(values, self.old)
        return notes


@dataclass(frozen=True, slots=True)
class Remove:
    """A key of earlier versions whose meaning other keys have taken over, which come before it."""

    key: str
    """Dotted name."""
    instead: str
    """The keys that say it now."""

    def apply(self, values: Values) -> list[str]:
        """Drop the key."""
        section, name = _parent(values, self.key)
        if section is None or name not in section:
            return []
        del section[name]
        return [f"{self.key}: is said by {self.instead} now"]


Change = Fill | Rename | Remove
"""One change of the keys, applied to a saved configuration in place; returns notes."""


def _parent(values: Values, key: str) -> tuple[Values | None, str]:
    """The section that holds a dotted key, made if it is missing, and the key's last name.

    The section is None where it is null, or where there is a value in its place.
    """
    *path, name = key.split(".")
    section: Any = values
    for part in path:
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            return None, name
    return section, name


def _drop_empty_sections(values: Values, key: str) -> None:
    """Remove the sections on the way to a dotted key that hold nothing: the schema may not have them now."""
    path = key.split(".")[:-1]
    while path:
        section, name = _parent(values, ".".join(path))
        if section is None or section.get(name) != {}:
            return
        del section[name]
        path.pop()


def _by_device(cpu: object, cuda: object) -> Callable[[Values], object]:
    def choose(values: Values) -> object:
        return cuda if values.get("cluster", {}).get("device") == "cuda" else cpu

    return choose


def _sources_of_blend(values: Values) -> object:
    """A source for each kind of the one shard set that there was."""
    blend = values.get("data", {}).get("blend") or {}
    return {
        kind: {"format": "shards", "path": ".", "kinds": [kind], "weight": share}
        for kind, share in blend.items()
    }


def _read_timeout_s(values: Values) -> object:
    """There was none but that of a stall, before which what hangs is named now."""
    stall_timeout_s = (values.get("train") or {}).get("stall_timeout_s")
    return stall_timeout_s / 10 if isinstance(stall_timeout_s, int | float) else 60.0


def _of_vision(name: str) -> Callable[[Values], object]:
    """A key of tower and projector together."""

    def choose(values: Values) -> object:
        return ((values.get("optim") or {}).get("vision") or {}).get(name)

    return choose


_VISION = ("vision_tower", "mm_projector")
_KEEP_ALL = {
    "norm": {"input": "keep", "output": "keep"},
    "mla": {"latent": "keep", "up_input": "keep", "up_proj": "keep", "rotations": "keep"},
    "attention": {"output": "keep", "joined": "keep"},
    "router": {"scores": "keep"},
    "moe": {"up_input": "keep", "swiglu_input": "keep", "down_input": "keep", "probs": "keep"},
    "shared_expert": {"swiglu_input": "keep", "down_input": "keep"},
    "dense": {"swiglu_input": "keep", "down_input": "keep"},
    "head": {"logits": "keep"},
    "vision": {"encoder": "keep"},
    "rest": "keep",
    "host_gib": None,
    "host_margin": 1.5,
    "device_gib": None,
    "passes_ahead": 2,
}
_MUON = {
    "momentum": 0.95,
    "nesterov": True,
    "newton_schulz_steps": 5,
    "newton_schulz_coefficients": "simple",
    "newton_schulz_dtype": "float32",
    "exchange_dtype": "float32",
    "update_rms": 0.2,
    "per_head": False,
    "exchange_mib": 512,
}

_MANAGER: Values = {
    "placement": "in_process", "shards": 1, "max_live": 4096, "max_sandboxes": 8, "kv_low": 0.6,
    "kv_high": 0.9, "max_turns": 16, "max_observation_tokens": 1024, "tool_timeout_s": 30.0,
    "rollout_timeout_s": 1800.0, "teardown_timeout_s": 10.0, "stuck_s": 300.0, "max_restarts": 3,
    "gateway_host": "127.0.0.1", "gateway_port": 0, "status_port": None,
}  # fmt: skip
_SANDBOX: Values = {
    "kind": "bubblewrap", "image": None, "cpus": 1.0, "memory_bytes": 2**30, "disk_bytes": 2**28,
    "processes": 128, "output_bytes": 2**20, "ttl_s": 7200.0,
}  # fmt: skip


def _tasks_of_one_turn(values: Values) -> object:
    """Sources whose prompts were as their families made them."""
    # As a text that says null, too: a saved configuration may hold values as typed.
    environment = values.get("environment")
    sources = (environment.get("tasks") or {}) if isinstance(environment, Mapping) else {}
    return {name: {"diversify": False, "instructions": 0, "agent": None} for name in sources}


def _rates_of_one_rate(values: Values) -> object:
    """Of a device whose kernels all ran at one rate: those of `conf/device/cpu` and `h800`."""
    rate = (values.get("cluster") or {}).get("model_tflops", 0.01)
    memory_gb = (values.get("cluster") or {}).get("gpu_memory_gb")
    on_cpu = {**_CPU_RATES, "bf16_tflops": rate, "float32_tflops": rate}
    return _by_device(on_cpu, {**_H800_RATES, "memory_gb": memory_gb})(values)


_CALIBRATION = {"kernels": 1.0, "exchange": 1.0, "pass_ms": 0.0, "step_ms": 0.0}
_CPU_RATES: Values = {
    "device": "cpu", "bf16_tflops": 0.01, "fp8_tflops": None, "float32_tflops": 0.01, "num_sms": 1,
    "memory_gb": None, "memory_gb_per_s": None, "gemm_efficiency": 1.0, "fp8_efficiency": 1.0,
    "attention_efficiency": 1.0, "attention_backward_efficiency": 1.0, "attention_half_keys": 0.0,
    "memory_efficiency": 1.0,
    "nvlink_gb_per_s": None, "nvlink_ranks": 1, "pcie_gb_per_s": None, "launch_us": 0.0, "gap_us": 0.0,
    "calibration": {**_CALIBRATION, "exchange": 0.0},
}  # fmt: skip
_H800_RATES: Values = {
    "device": "H800", "bf16_tflops": 989.0, "fp8_tflops": 1979.0, "float32_tflops": 67.0, "num_sms": 132,
    "memory_gb_per_s": 3350.0, "gemm_efficiency": 0.78, "fp8_efficiency": 0.78,
    "attention_efficiency": 0.7, "attention_backward_efficiency": 0.6, "attention_half_keys": 420.0,
    "memory_efficiency": 0.72,
    "nvlink_gb_per_s": 150.0, "nvlink_ranks": 8, "pcie_gb_per_s": 55.0, "launch_us": 25.0, "gap_us": 1.0,
    "calibration": _CALIBRATION,
}  # fmt: skip
_SLURM_OF_ANY_SITE: Values = {
    "reservation": None, "nice": None, "comment": None, "gres": None, "exclusive": True, "mem": "0",
    "cpus_per_task": None, "constraint": None, "exclude": None, "switches": None, "switches_wait_min": None,
    "sbatch": [], "setup": [], "mpi": None, "container_setup": [], "container_credentials": None,
}  # fmt: skip

_METRICS = {
    "weight_norm_interval": 20,
    "wandb": None,
    "mlflow": None,
    "alarms": {
        **dict.fromkeys(("loss_spike", "grad_spike", "expert_load", "throughput")),
        "checkpoint": False,
    },
}
"""Nothing raised an alarm; norms of weights were not taken, which no interval says."""

MIGRATIONS: tuple[tuple[Change, ...], ...] = (
    # 0 to 1. Files without a version: keys were added over many commits, none was renamed.
    (
        Fill("model.latent_norm_eps", 1e-6),
        Fill("parallelism.overlap_expert_comm", False),
        Fill("parallelism.delay_wgrad", False),
        Fill("parallelism.overlap_grad_reduce", False),
        Fill("parallelism.overlap_param_gather", False),
        # Before these keys there were only coupled towers.
        Fill("dep.mode", "coupled"),
        Fill("dep.schedule", "upfront"),
        Fill("dep.max_patches_per_chunk", 16384),
        Fill("dep.split_items", False),
        Fill("dep.exchange_dtype", None),
        Fill("dep.feature_buffer_gib", 2.0),
        Fill("activation", _KEEP_ALL),
        Fill("optim.offload", "none"),
        Fill("optim.qk_clip_threshold", None),
        # The first gradient that was not finite ended the run.
        Fill("optim.max_skipped_steps", 0),
        # Nothing reads it where AdamW is the only rule, as it was before.
        Fill("optim.muon", _MUON),
        Fill("optim.vision.name", lambda values: values.get("optim", {}).get("name")),
        Fill("optim.vision.lr_scale", 1.0),
        Fill("optim.vision.trained", "all"),
        Fill("train.stall_timeout_s", 600.0),
        Fill("train.trace_step", None),
        # Facts of the machines, read by plans alone: those of `conf/cluster/local` and `h800_roce`.
        Fill("cluster.model_tflops", _by_device(0.01, 396.0)),
        Fill("cluster.network_gb_per_s", _by_device(1.0, 50.0)),
        Fill("cluster.host_copy_gb_per_s", _by_device(5.0, 20.0)),
        Fill("cluster.gpu_memory_gb", _by_device(None, 80.0)),
        Fill("cluster.host_memory_gib", _by_device(8.0, 2000.0)),
        Fill("cluster.slurm", None),
        Fill("cluster.slurm.preflight", False),
        Fill("cluster.fabric", None),
    ),
    # 1 to 2.
    (
        # What the data are was not recorded, and whether a checkpoint is sound neither.
        Fill("checkpoint.accept_changed_data", False),
        Fill("checkpoint.accept_unsound", False),
    ),
    # 2 to 3. What sites have; the script asked for whole nodes with all of their memory.
    (
        *(Fill(f"cluster.slurm.{name}", value) for name, value in _SLURM_OF_ANY_SITE.items()),
        Fill("cluster.fabric.nccl_interfaces", None),
        Fill("cluster.fabric.address_family", "ipv4"),
        Fill("cluster.environment", {}),
        Fill("cluster.overrides", {}),
        Fill("cluster.secrets", {}),
    ),
    # 3 to 4.
    (
        Fill("cluster.kubernetes", None),
        Fill("cluster.fabric.mtu_bytes", None),
        Fill("cluster.gpu", None),
    ),
    # 4 to 5.
    (
        Fill("data.read_in", "thread"),
        Fill("parallelism.dispatcher", "alltoall"),
        Fill("parallelism.dispatcher_sms", None),
        Fill("parallelism.dispatcher_capacity", None),
        Fill("train.deterministic", False),
        Fill("optim.qk_clip_interval", 1),
    ),
    # 5 to 6. One shard set with a share for each kind of sample; sources of any format now.
    (
        Fill("data.sources", _sources_of_blend),
        Remove("data.blend", "data.sources"),
        Fill("data.vision_ratio", None),
        Fill("data.schedule", {}),
        Fill("data.workers", 0),
        Fill("data.decoder", "pillow"),
        Fill("data.augment", {"crop": 0.0, "flip": 0.0, "colour": 0.0}),
        Fill("data.read_timeout_s", _read_timeout_s),
        Fill("data.cache_dir", None),
        Fill("data.cache_gib", 100.0),
        Fill("data.requests_per_s", None),
    ),
    # 6 to 7. A save kept every rank waiting until all was written, into the run folder.
    (
        Fill("checkpoint.keep_every", 0),
        Fill("checkpoint.dir", None),
        Fill("checkpoint.local_dir", None),
        Fill("checkpoint.local_interval", "5min"),
        Fill("checkpoint.asynchronous", False),
        Fill("checkpoint.writers", 4),
        Fill("checkpoint.verify", "full"),
        Fill("checkpoint.init_from", None),
        Fill("checkpoint.init_parts", {}),
        Fill("checkpoint.init_fresh", []),
        Fill("checkpoint.init_leave_out", []),
    ),
    # 7 to 8. All kernels were planned at one rate, which nothing but plans reads.
    (
        Fill("model.num_key_value_heads", None),
        Fill("cluster.rates", _rates_of_one_rate),
        Remove("cluster.model_tflops", "cluster.rates"),
        Remove("cluster.gpu_memory_gb", "cluster.rates.memory_gb"),
    ),
    # 8 to 9. A rank had all tokens of its sequences; update rules were of the language model and of all of
    # vision; schedules counted steps alone.
    (
        Fill("parallelism.cp", 1),
        Fill("parallelism.cp_exchange", None),
        Rename("optim.name", "optim.language_model.name"),
        *(Fill(f"optim.{part}.name", _of_vision("name")) for part in _VISION),
        *(Fill(f"optim.{part}.lr_scale", _of_vision("lr_scale")) for part in _VISION),
        Fill("optim.vision_tower.trained", lambda values: _of_vision("trained")(values) == "all"),
        Fill("optim.mm_projector.trained", lambda values: _of_vision("trained")(values) != "nothing"),
        Remove("optim.vision", "optim.vision_tower and optim.mm_projector"),
        Fill("optim.language_model.trained", True),
        Fill("optim.language_model.lr_scale", 1.0),
        *(Fill(f"optim.{part}.grad_clip", None) for part in ("language_model", *_VISION)),
        Fill("optim.start_lr", 0.0),
        Rename("optim.warmup_steps", "optim.warmup"),
        Rename("optim.decay_steps", "optim.decay"),
        Fill("optim.frozen_expert_bias", 0),
        Fill("train.tokens", None),
        Fill("train.batch_ramp", {"start": None, "increment": 1, "length": 0}),
        Fill("checkpoint.init_optimizer", False),
        Fill("metrics", _METRICS),
    ),
    # 9 to 10. There was no reinforcement learning, and experts computed with their weights as they are.
    (
        Fill("model.quantization", "none"),
        Fill("algorithm", None),
        Fill("rollout", None),
        Fill("environment", None),
        Fill("data.zero_vision", False),
    ),
    # 10 to 11. A rollout was one response of an engine, to a prompt as its family made it.
    (
        Fill("rollout.manager", _MANAGER),
        Fill("environment.sandbox", _SANDBOX),
        Fill("environment.tasks", _tasks_of_one_turn),
    ),
)
"""[n] -> what brings a configuration of version n to version n + 1, in order."""
SAID_BY = {
    each.old if isinstance(each, Rename) else each.key: each.new if isinstance(each, Rename) else each.instead
    for changes in MIGRATIONS
    for each in changes
    if not isinstance(each, Fill)
}
"""Key of earlier versions -> what says it now."""
VERSION = len(MIGRATIONS)
"""Version of the keys that are written now."""


def migrate(saved: Mapping[str, Any]) -> Migrated:
    """A saved configuration under today's keys; `saved` is not changed.

    Raises:
        ConfigError: it was written by a later version, or its version is not one.
    """
    values = copy.deepcopy(dict(saved))
    version = values.pop(VERSION_KEY, 0)
    if isinstance(version, bool) or not isinstance(version, int) or not 0 <= version <= VERSION:
        rule = f"must be a version that this code knows, 0 to {VERSION}"
        remedy = "use the code that wrote the file, or a later one"
        raise ConfigError(f"{VERSION_KEY}={version}: {rule}\n  -> {remedy}")
    notes = [note for changes in MIGRATIONS[version:] for each in changes for note in each.apply(values)]
    return Migrated(values, notes)
