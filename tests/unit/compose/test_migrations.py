"""Saved configurations of earlier versions load with the meaning that they had."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from k25_train.checkpoint.continuity import SAME_RUN, check_continuity
from k25_train.compose import migrations
from k25_train.compose.migrations import VERSION, VERSION_KEY, Fill, Rename, migrate
from k25_train.compose.resolve import compose, load, to_yaml
from k25_train.config.leaves import leaves
from k25_train.errors import CheckpointError, ConfigError
from parallel.config import DepMode
from tests.helpers.project_sources import REPO

SAMPLES = REPO / "tests/golden/configs"
NO_OVERLAP = {
    f"parallelism.{name}": False
    for name in ("overlap_expert_comm", "delay_wgrad", "overlap_grad_reduce", "overlap_param_gather")
}
CPU = {"cluster.rates.float32_tflops": 0.01, "cluster.host_memory_gib": 8.0, "cluster.rates.memory_gb": None}
FILLED: dict[str, dict[str, Any]] = {
    "first_smoke": NO_OVERLAP
    | CPU
    | {
        "model.latent_norm_eps": 1e-6,
        "dep.schedule": "upfront",
        "optim.offload": "none",
        "optim.qk_clip_threshold": None,
        "optim.max_skipped_steps": 0,
        "optim.mm_projector.name": "adamw",
        "optim.vision_tower.lr_scale": 1.0,
        "train.stall_timeout_s": 600.0,
    },
    "muon_decoupled": CPU | {"optim.mm_projector.trained": True, "dep.split_items": False},
    "slurm_no_activations": {"cluster.slurm.preflight": False, "cluster.rates.memory_gb": 80.0},
    "fabric_of_one_site": {
        "cluster.fabric.mtu_bytes": None,
        "cluster.slurm.exclusive": True,
        "cluster.slurm.mem": "0",
        "cluster.slurm.setup": [],
        "cluster.fabric.address_family": "ipv4",
    },
    "one_resume_rule": {"checkpoint.accept_changed_data": False, "checkpoint.accept_unsound": False},
    "slurm_alone": {"cluster.kubernetes": None, "cluster.gpu": None},
    "alltoall_alone": {
        "data.read_in": "thread",
        "parallelism.dispatcher": "alltoall",
        "parallelism.dispatcher_sms": None,
        "parallelism.dispatcher_capacity": None,
        "train.deterministic": False,
        "optim.qk_clip_interval": 1,
    },
    "one_shard_set": {
        "data.sources.text.format": "shards",
        "data.sources.text.path": ".",
        "data.sources.video.kinds": ["video"],
        "data.sources.video.weight": 0.1,
        "data.vision_ratio": None,
        "data.workers": 0,
        "data.decoder": "pillow",
        "data.augment.flip": 0.0,
        "data.read_timeout_s": 60.0,
        "data.cache_dir": None,
        "data.cache_gib": 100.0,
        "data.requests_per_s": None,
    },
    "synchronous_saves": {
        "checkpoint.asynchronous": False,
        "checkpoint.keep_every": 0,
        "checkpoint.dir": None,
        "checkpoint.verify": "full",
        "checkpoint.init_from": None,
    },
    "flat_rate": {
        "cluster.rates.device": "H800",
        "cluster.rates.memory_gb": 84.9,
        "cluster.rates.calibration.kernels": 1.0,
    },
    "whole_sequences": {"parallelism.cp": 1, "parallelism.cp_exchange": None},
    "rule_of_all_vision": {
        "optim.language_model.trained": True,
        "optim.language_model.lr_scale": 1.0,
        "optim.language_model.grad_clip": None,
        "optim.vision_tower.name": "adamw",
        "optim.vision_tower.lr_scale": 0.5,
        "optim.vision_tower.trained": False,
        "optim.mm_projector.trained": True,
        "optim.mm_projector.lr_scale": 0.5,
        "optim.start_lr": 0.0,
        "optim.frozen_expert_bias": 0,
        "train.tokens": None,
        "train.batch_ramp.start": None,
        "checkpoint.init_optimizer": False,
        "metrics.wandb": None,
        "metrics.alarms.loss_spike": None,
        "metrics.alarms.checkpoint": False,
    },
    "no_reinforcement": {
        "algorithm": None,
        "rollout": None,
        "environment": None,
        "model.quantization": "none",
        "data.zero_vision": False,
    },
    "responses_of_one_turn": {
        "rollout.manager.placement": "in_process",
        "rollout.manager.max_turns": 16,
        "environment.sandbox.kind": "bubblewrap",
    },
}
"""Sample -> some of the keys that it lacks, with what the code that wrote it did."""
RENAMED = {"name": ("language_model", "name"), "warmup_steps": ("warmup",), "decay_steps": ("decay",)}
"""Key of `optim` -> where it is now."""


def saved(sample: str) -> dict[str, Any]:
    """The file's own values."""
    return yaml.safe_load((SAMPLES / f"{sample}.yaml").read_text())


def changed(folder: Path, changes: dict[str, object], sample: str = "muon_decoupled") -> Path:
    """A copy of a sample with other top-level values."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(saved(sample) | changes))
    return path


@pytest.mark.parametrize("sample", FILLED)
def test_a_saved_file_keeps_its_values_and_the_others_are_what_its_code_did(sample: str) -> None:
    config, notes = load(SAMPLES / f"{sample}.yaml")
    now = yaml.safe_load(to_yaml(config))
    given, derived = saved(sample), now.pop("derived")
    given.pop(VERSION_KEY, None)
    # Sources have taken the place of its shares.
    if blend := given["data"].pop("blend", None):
        assert {name: source.weight for name, source in config.data.sources.items()} == blend
    # One rate has given way to those of a device.
    given["cluster"].pop("model_tflops", None)
    given["cluster"].pop("gpu_memory_gb", None)
    # What is named otherwise since then.
    vision = given["optim"].pop("vision", {})
    parts = (config.optim.vision_tower, config.optim.mm_projector)
    assert all({part.lr_scale} == {vision.get("lr_scale", 1.0)} for part in parts)
    for old, new in RENAMED.items() if "name" in given["optim"] else ():
        given["optim"][new[0]] = (
            given["optim"].pop(old) if len(new) == 1 else {new[1]: given["optim"].pop(old)}
        )
    for name, size in given.pop("derived").items():
        # Layouts are balanced by a better estimate of costs than then, and a checkpoint fits any.
        assert name == "layout" or derived[name] == size, name
    values = dict(leaves(now))
    assert {key: values[key] for key in dict(leaves(given))} == dict(leaves(given))
    assert {key: values[key] for key in FILLED[sample]} == FILLED[sample]
    assert config.activation.keeps_all
    added = values.keys() - dict(leaves(given)).keys() - {VERSION_KEY}
    told = [note.split(":")[0] for note in notes if "is said by" not in note and "is called" not in note]
    assert len(set(told)) == len(told)
    assert all(any(f"{key}.".startswith(f"{name}.") for name in told) for key in added)
    assert not set(told) & dict(leaves(given)).keys()


def test_a_file_without_the_encoders_section_has_a_coupled_tower(tmp_path: Path) -> None:
    """The only one that there was before the keys."""
    config, notes = load(changed(tmp_path, {"dep": {}}))
    assert config.dep.mode is DepMode.coupled
    assert any(note.startswith("dep.mode: 'coupled'") for note in notes)


def test_a_current_file_needs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(compose(["experiment=smoke"])))
    assert path.read_text().startswith(f"{VERSION_KEY}: {VERSION}\n")
    assert load(path).notes == []


def test_overrides_come_after_migrations() -> None:
    config, _ = load(
        SAMPLES / "first_smoke.yaml", ["optim.max_skipped_steps=3", "activation.moe.up_input=fp8"]
    )
    assert config.optim.max_skipped_steps == 3
    assert config.activation.moe.up_input.value == "fp8"


def test_an_unknown_key_is_still_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.stpes=3"):
        load(changed(tmp_path, {"train": saved("muon_decoupled")["train"] | {"stpes": 3}}))


def test_a_key_that_every_version_had_is_still_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.seq_len\n.*must be given"):
        load(changed(tmp_path, {"train": {"steps": 5}}))


@pytest.mark.parametrize("version", [VERSION + 1, -1, "new", True])
def test_a_version_that_is_not_known_is_refused(tmp_path: Path, version: object) -> None:
    path = changed(tmp_path, {VERSION_KEY: version})
    with pytest.raises(ConfigError, match=f"{VERSION_KEY}=.*must be a version") as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert "use the code that wrote the file" in str(caught.value)


def test_versions_are_passed_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = (
        (Rename("a.old", "a.new"), Fill("b", {"c": 1, "d": {"e": 2}})),
        (Fill("a.more", lambda values: values["a"]["new"] + 1),),
    )
    monkeypatch.setattr(migrations, "MIGRATIONS", steps)
    monkeypatch.setattr(migrations, "VERSION", 2)
    given = {"a": {"old": 3}, "b": {"d": {}}}
    assert migrate(given).values == {"a": {"new": 3, "more": 4}, "b": {"c": 1, "d": {"e": 2}}}
    assert [note.split(":")[0] for note in migrate(given).notes] == ["a.old", "b.c", "b.d.e", "a.more"]
    assert given == {"a": {"old": 3}, "b": {"d": {}}}, "what is given is not changed"
    later = {VERSION_KEY: 1, "a": {"new": 3}}
    assert migrate(later).values == {"a": {"new": 3, "more": 4}}
    assert migrate({VERSION_KEY: 2, "a": {"new": 3}}) == ({"a": {"new": 3}}, [])


@pytest.mark.parametrize("old", [{}, {"a": {"b": {"c": 3}}}, {"a": {"b": {"c": 3}}, "e": {"f": 1}}])
def test_a_key_that_moves_leaves_no_empty_section(
    monkeypatch: pytest.MonkeyPatch, old: dict[str, Any]
) -> None:
    monkeypatch.setattr(migrations, "MIGRATIONS", ((Rename("a.b.c", "e.c"),),))
    monkeypatch.setattr(migrations, "VERSION", 1)
    moved = {"c": 3} if old else {}
    assert migrate(old).values.get("e", {}) == old.get("e", {}) | moved
    assert "a" not in migrate(old).values


def test_a_section_that_is_null_gets_no_keys() -> None:
    assert migrate({"cluster": {"slurm": None}}).values["cluster"]["slurm"] is None


def test_a_checkpoint_of_an_earlier_version_is_compared_by_what_it_meant(tmp_path: Path) -> None:
    path = changed(tmp_path, {})
    config, _ = load(path)
    check_continuity(tmp_path, config, SAME_RUN)
    frozen, _ = load(path, ["optim.vision_tower.trained=false"])
    with pytest.raises(CheckpointError, match="trained=True in the checkpoint, False now"):
        check_continuity(tmp_path, frozen, SAME_RUN)
