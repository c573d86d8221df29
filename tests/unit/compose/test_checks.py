"""Every rule of the configuration: broken by an override, reported with key, value, rule and remedy."""

import functools
import re
from collections.abc import Callable

import pytest

from k25_train.compose import checks
from k25_train.compose.checks import divisors
from k25_train.compose.resolve import compose
from k25_train.errors import ConfigError
from parallel.config import Problem

BROKEN_WITHIN = [
    ("parallelism.pp=0", "parallelism.pp=0", "must be positive"),
    ("parallelism.ep=-1", "parallelism.ep=-1", "must be positive"),
    ("parallelism.pp=1", "parallelism.vpp=2", "needs a pipeline (pp > 1)"),
    ("parallelism.delay_wgrad=true", "parallelism.delay_wgrad=True", "needs overlap_expert_comm=true"),
    (
        "parallelism.overlap_param_gather=true",
        "parallelism.overlap_param_gather=True",
        "needs overlap_grad_reduce=true",
    ),
    ("model.num_layers=0", "model.num_layers=0", "must be positive"),
    ("model.vocab_size=-5", "model.vocab_size=-5", "must be positive"),
    ("model.num_dense_layers=-1", "model.num_dense_layers=-1", "must not be negative"),
    ("model.num_dense_layers=6", "model.num_dense_layers=6", "must not exceed num_layers (5)"),
    ("model.num_experts_per_token=9", "model.num_experts_per_token=9", "must not exceed num_experts (8)"),
    ("model.hidden_size=130", "model.hidden_size=130", "must be a multiple of 8"),
    ("model.expert_ffn_hidden_size=100", "model.expert_ffn_hidden_size=100", "must be a multiple of 8"),
    ("model.qk_nope_head_dim=17", "model.qk_nope_head_dim=17", "must be even"),
    ("model.qk_rope_head_dim=15", "model.qk_rope_head_dim=15", "must be even"),
    (
        "model.v_head_dim=64",
        "model.v_head_dim=64",
        "must not exceed qk_nope_head_dim + qk_rope_head_dim (32)",
    ),
    ("model.rope.scaling_factor=0.5", "model.rope.scaling_factor=0.5", "must be 1.0 (plain RoPE) or more"),
    ("model.rope.beta_fast=0.5", "model.rope.beta_fast=0.5", "must not lie below beta_slow (1.0)"),
    (
        "model.vision.hidden_size=100",
        "model.vision.hidden_size=100",
        "multiple of 4 x num_attention_heads (4)",
    ),
    ("model.vision.merge_size=3", "model.vision.merge_size=3", "must be 2"),
    (
        "model.vision.side_patch_limit=513",
        "model.vision.side_patch_limit=513",
        "must not exceed rope_max_grid",
    ),
    ("model.vision.frame_patch_limit=3", "model.vision.frame_patch_limit=3", "room for one merged token"),
    ("model.vision.video_fps=0", "model.vision.video_fps=0.0", "must be positive"),
    ("optim.min_lr=1", "optim.min_lr=1.0", "must not exceed lr"),
    ("optim.beta2=1", "optim.beta2=1.0", "must lie in [0, 1)"),
    ("optim.grad_clip=0", "optim.grad_clip=0.0", "must be positive"),
    ("optim.warmup=-1", "optim.warmup=-1", "must be a number of steps, or one of tokens"),
    ("optim.max_skipped_steps=-1", "optim.max_skipped_steps=-1", "must not be negative"),
    ("optim.qk_clip_threshold=0", "optim.qk_clip_threshold=0.0", "must be positive"),
    ("optim.qk_clip_interval=0", "optim.qk_clip_interval=0", "must be positive"),
    ("optim.muon.momentum=1", "optim.muon.momentum=1.0", "must lie in [0, 1)"),
    ("optim.muon.newton_schulz_steps=0", "optim.muon.newton_schulz_steps=0", "must be positive"),
    ("optim.muon.update_rms=-1", "optim.muon.update_rms=-1.0", "must be positive"),
    ("optim.muon.exchange_mib=0", "optim.muon.exchange_mib=0", "must be positive"),
    (
        "optim.mm_projector.lr_scale=0",
        "optim.mm_projector.lr_scale=0.0",
        "must be positive",
    ),
    ("data.dir=''", "data.dir=", "must name a folder"),
    ("data.limit_samples=0", "data.limit_samples=0", "must be positive"),
    ("data.max_skipped_samples=-1", "data.max_skipped_samples=-1", "a share of them below 1"),
    ("data.sources.text.weight=-1", "data.sources.text.weight=-1.0", "must not be negative"),
    ("data.sources.text.kinds=[vidoe]", "data.sources.text.kinds=vidoe", "known kinds: text, caption, ocr"),
    (
        "data.sources.more={format:chat,path:x,kinds:[text]}",
        "data.sources.more.kinds=['text']",
        "are only for format=shards",
    ),
    (
        "data.sources.text.heldout=5",
        "data.sources.text.heldout=5",
        "is not for format=shards, whose files say what is held out",
    ),
    ("data.vision_ratio=1", "data.vision_ratio=1.0", "must be between 0 and 1"),
    (
        "data.schedule.late={from_step:0,weights:{vidoe:1}}",
        "data.schedule.late.weights.vidoe",
        "is none of data.sources: text, caption, ocr, video",
    ),
    ("data.schedule.late={from_step:0}", "data.schedule.late.from_step=0", "must be positive"),
    (
        "data.schedule.a={from_step:9} data.schedule.b={from_step:9}",
        "data.schedule.b.from_step=9",
        "is the first step of a, too",
    ),
    ("data.augment.flip=1", "data.augment.flip=1.0", "must be at least 0 and below 1"),
    ("train.seq_len=0", "train.seq_len=0", "must be positive"),
    ("train.seed=-1", "train.seed=-1", "must not be negative"),
    ("train.eval_sequences=7", "train.eval_sequences=7", "must be even"),
    ("checkpoint.keep=0", "checkpoint.keep=0", "must be positive"),
    ("run.dir=''", "run.dir=", "must name a folder"),
    ("cluster.nodes=0", "cluster.nodes=0", "must be positive"),
]
ON_CUDA = "cluster.device=cuda cluster.rates.memory_gb=80 train.dtype=bfloat16"
UNSEEN = "data.zero_vision=true ~data.sources.caption ~data.sources.ocr ~data.sources.video"
RL = "algorithm=k25 rollout=in_process environment=sums"
BROKEN_ACROSS = [
    ("algorithm=k25", "rollout", "must be given together with algorithm"),
    (UNSEEN, "optim.vision_tower.trained=True", "must be false with data.zero_vision"),
    (
        f"{UNSEEN} {RL} optim.vision_tower.trained=false optim.mm_projector.trained=false",
        "data.zero_vision=True",
        "is for fine-tuning on data",
    ),
    (f"{RL} rollout.max_tokens=200", "rollout.max_tokens=200", "must leave room for a prompt"),
    (
        f"{RL} algorithm.other_versions=mask algorithm.steps_per_rollout=2",
        "algorithm.other_versions=mask",
        "needs algorithm.steps_per_rollout=1",
    ),
    (
        f"{RL} environment.tasks.sums.rubrics.helpfulness=0.5",
        "environment.tasks.sums.rubrics=",
        "needs rollout.judge_url",
    ),
    (
        f"{RL} algorithm.token_cap=8 algorithm.max_staleness=1",
        "algorithm.token_cap=8",
        "needs algorithm.max_staleness=0",
    ),
    (
        f"{RL} algorithm.form=sequence parallelism.cp=2 parallelism.ep=1",
        "algorithm.form=sequence",
        "needs parallelism.cp=1",
    ),
    (f"{RL} rollout.weights=int4", "rollout.weights=int4", "needs model.quantization=int4_qat"),
    (f"{RL} rollout.weights=bf16", "rollout.weights=bf16", "needs train.dtype=bfloat16"),
    ("parallelism.pp=3", "parallelism.pp=3", "must divide the 4 ranks (nodes 1 x 4)"),
    ("parallelism.vpp=4", "parallelism.pp=2", "cuts 5 layers into pp x vpp = 8 chunks"),
    ("parallelism.layout='Et|t|t|tL'", "parallelism.layout=Et|t|t|tL", "it has 4 layers"),
    ("model.num_experts=9", "parallelism.ep=2", "must divide model.num_experts (9)"),
    ("parallelism.ep=4", "parallelism.ep=4", "must divide the 2 ranks of a stage (4 / pp 2)"),
    ("parallelism.cp=4", "parallelism.cp=4", "must divide the 2 ranks of a stage (4 / pp 2)"),
    (
        "parallelism.cp=2 train.seq_len=255 train.micro_batch_size=1",
        "parallelism.cp=2",
        "must divide the 255 tokens of a micro-batch",
    ),
    (
        "model.num_dense_layers=5 parallelism.overlap_expert_comm=true",
        "parallelism.overlap_expert_comm=True",
        "needs layers with experts; all 5 are dense",
    ),
    ("data.read_timeout_s=200", "data.read_timeout_s=200", "must be below 200: a read is tried for 3 times"),
    ("train.global_batch_size=18", "train.global_batch_size=18", "must be a multiple of 4"),
    ("train.eval_sequences=38", "train.eval_sequences=38", "must be a multiple of 4"),
    ("train.global_batch_size=4", "train.global_batch_size=4", "must be 8 or more (2 x micro_batch_size 2"),
    ("train.eval_sequences=4", "train.eval_sequences=4", "with vpp > 1 each of the pp ranks"),
    ("train.steps=119", "train.steps=119", "room for optim.warmup (20) + optim.decay (100)"),
    ("train.seq_len=1025", "train.seq_len=1025", "rope.original_max_position x rope.scaling_factor (1024)"),
    (
        f"{ON_CUDA} model.qk_nope_head_dim=18",
        "model.qk_nope_head_dim=18",
        "makes attention heads 34 wide, but in bfloat16 CUDA's kernels take multiples of 8 up to 256",
    ),
    (f"{ON_CUDA} model.vision.hidden_size=80", "model.vision.hidden_size=80", "attention heads 20 wide"),
    ("train.transformer_engine=true", "train.transformer_engine=True", "needs cluster.device=cuda, not cpu"),
    ("parallelism.dispatcher=deepep", "parallelism.dispatcher=deepep", "has kernels for CUDA only"),
    (
        f"{ON_CUDA} parallelism.dispatcher=hybridep train.seq_len=250",
        "parallelism.dispatcher=hybridep",
        "moves chunks of 64 tokens, and a micro-batch has 500",
    ),
    (
        f"{ON_CUDA} parallelism.dispatcher=deepep parallelism.dispatcher_sms=96",
        "parallelism.dispatcher_sms=96",
        "would take 148 of the 128",
    ),
]
SMOKE = [
    "experiment=smoke",
    "optim.warmup=20",
    "optim.decay=100",
    "train.micro_batch_size=2",
    "data.sources.text.weight=0.45",
    "data.sources.caption.weight=0.4",
    "model.rope.original_max_position=256",
]


@pytest.mark.parametrize(("override", "shown", "rule"), BROKEN_WITHIN + BROKEN_ACROSS)
def test_broken_rule_is_reported(override: str, shown: str, rule: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose([*SMOKE, *override.split()])
    lines = str(caught.value).splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(f"  {shown}"))
    assert rule in lines[at + 1]
    assert lines[at + 2].startswith("      -> ")


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallelism=serial", "cluster.gpus_per_node=1"],
        ["train.dtype=bfloat16"],
        ["parallelism.vpp=1", "train.global_batch_size=4", "train.eval_sequences=4"],
        ["train.steps=120"],
        ["optim.min_lr=0", "optim.warmup=0", "optim.decay=0", "train.steps=1"],
        ["model.rope.scaling_factor=1"],
        ["model.num_dense_layers=5"],
        ["parallelism.layout='Et|t|t|ttL'"],
        ["parallelism.vpp=3"],
        ["train.global_batch_size=12", "train.eval_sequences=20"],
        ["parallelism.overlap_expert_comm=true", "parallelism.delay_wgrad=true"],
        ["parallelism.overlap_grad_reduce=true", "parallelism.overlap_param_gather=true"],
        ["data.prefetch_steps=0"],
        ["optim=muonclip", "optim.muon.momentum=0", "optim.max_skipped_steps=0"],
        [
            "optim=muonclip",
            "optim.qk_clip_threshold=null",
            "optim.vision_tower.name=adamw",
            "optim.mm_projector.name=adamw",
        ],
    ],
)
def test_legal_settings_pass(overrides: list[str]) -> None:
    compose([*SMOKE, *overrides])


def test_remedies_are_legal() -> None:
    with pytest.raises(ConfigError, match="use 16 or 20"):
        compose([*SMOKE, "train.global_batch_size=18"])
    for size in (16, 20):
        compose([*SMOKE, f"train.global_batch_size={size}"])
    three_replicas = ["parallelism=serial", "cluster.gpus_per_node=3", "train.global_batch_size=12"]
    with pytest.raises(ConfigError, match=r"eval_sequences=20\n.*multiple of 6 .*\n.*use 18 or 24"):
        compose([*SMOKE, *three_replicas, "train.eval_sequences=20"])
    odd = [*three_replicas, "train.micro_batch_size=1"]
    with pytest.raises(ConfigError, match=r"eval_sequences=2\n.*multiple of 3 .*\n.*use 6$"):
        compose([*SMOKE, *odd, "train.eval_sequences=2"])
    compose([*SMOKE, *odd, "train.eval_sequences=6"])


def test_sizes_that_fit_are_listed_and_legal() -> None:
    with pytest.raises(ConfigError) as caught:
        compose(["experiment=k25_pretrain_4k", "parallelism.vpp=4"])
    [remedy] = [line for line in str(caught.value).splitlines() if "->" in line]
    assert remedy.endswith("use one of (pp, vpp) = (16, 3), (8, 4), (16, 2), (8, 5), (8, 3), (8, 6)")
    for pp, vpp in re.findall(r"\((\d+), (\d+)\)", remedy):
        compose(["experiment=k25_pretrain_4k", f"parallelism.pp={pp}", f"parallelism.vpp={vpp}"])


def test_a_wrong_layout_is_answered_with_the_planned_one() -> None:
    with pytest.raises(ConfigError, match=r"correct it, or use null, which gives Ett\|t\|tt\|L$"):
        compose([*SMOKE, "parallelism.layout='Et|t|t|tL'"])
    with pytest.raises(ConfigError, match=r"has 4 chunks\n      -> use one of \(pp, vpp\) = \(2, 3\)"):
        compose([*SMOKE, "parallelism.vpp=4", "parallelism.layout='Et|t|t|tL'"])


def test_a_written_layout_may_leave_more_chunks_empty_than_a_planned_one() -> None:
    config = compose([*SMOKE, "parallelism.vpp=4", "parallelism.layout='Et|t|t|t|t|||L'"])
    assert config.parallelism.layout == "Et|t|t|t|t|||L"


@pytest.mark.parametrize(
    ("overrides", "rules"),
    [
        (["parallelism.ep=1"], ["needs experts spread over ranks (ep > 1)"]),
        (["parallelism.vpp=1"], ["needs virtual stages in a pipeline (vpp > 1 at pp=16)"]),
        (
            ["parallelism.pp=1", "parallelism.vpp=1", "train.global_batch_size=256"],
            ["must be 512 or more (2 x micro_batch_size 1 x data-parallel size 256)"],
        ),
        (["parallelism.overlap_expert_comm=false"], ["needs overlap_expert_comm=true"]),
        (["parallelism.overlap_grad_reduce=false"], ["needs overlap_grad_reduce=true"]),
    ],
)
def test_the_reports_plan_without_what_its_overlaps_need(overrides: list[str], rules: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(["experiment=k25_pretrain_4k", *overrides])
    told = str(caught.value).splitlines()
    assert len(told) == 1 + 3 * len(rules)
    for rule, line in zip(rules, told[2::3], strict=True):
        assert rule in line


def test_a_broken_section_silences_only_the_rules_that_read_it() -> None:
    with pytest.raises(ConfigError) as caught:
        compose([*SMOKE, "cluster.nodes=0", "train.steps=5"])
    assert "2 problems" in str(caught.value)
    assert "must divide" not in str(caught.value)


def test_every_rule_across_sections_is_broken_above(monkeypatch: pytest.MonkeyPatch) -> None:
    broken: set[str] = set()

    def watched(rule: Callable[..., list[Problem]]) -> Callable[..., list[Problem]]:
        @functools.wraps(rule)
        def call(**sections: object) -> list[Problem]:
            problems = rule(**sections)
            if problems:
                broken.add(rule.__name__)
            return problems

        return call

    monkeypatch.setattr(checks, "RULES", tuple(watched(rule) for rule in checks.RULES))
    for override, _, _ in BROKEN_ACROSS:
        with pytest.raises(ConfigError):
            compose([*SMOKE, *override.split()])
    assert broken == {rule.__name__ for rule in checks.RULES}


def test_divisors_of_large_numbers_are_cut() -> None:
    assert divisors(6) == "1, 2, 3, 6"
    assert divisors(5040).startswith("..., ")
