"""Rubrics of a run as configured: over a server, on top of what is verified, judged again until scored."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from k25_train.config.environment import EnvironmentConfig, TaskSourceConfig
from k25_train.config.rollout import RolloutConfig
from k25_train.data.chat_set.vocabulary import with_chat_tokens
from k25_train.data.tokenizer import load_tokenizer
from k25_train.environments.base import Task
from k25_train.environments.families.sums import Sums
from k25_train.errors import ConfigError, K25Error
from k25_train.rl.figures import sign_figures
from k25_train.rl.rewards.generative import Rubrics, open_rubrics
from k25_train.rl.rewards.judges import open_judges
from k25_train.rollout.engines.vllm.wire import GENERATE
from k25_train.rollout.trajectory import Group
from tests.helpers.bad_engine import BadEngine
from tests.helpers.engine_subjects import serving
from tests.helpers.rollout_sections import sandbox_section
from tests.helpers.scripted_rollouts import PlainPrompts, Rollouts, rollout_config
from tests.helpers.tiny_shards import tiny_vision_config

VOCABULARY = Path("tests/golden/shard_set_v1/tokenizer.json")
REPLY = '{"follows": 10, "complete": 5, "clear": 0}'
REWARD = 1 + 0.2 * 0.625
JUDGE = "judge answer with the rubrics of sums"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a judging server serves, as far as its clients read it."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "tokenizer.json").write_bytes(with_chat_tokens(VOCABULARY.read_bytes(), "golden"))
    size = load_tokenizer(str(folder / "tokenizer.json")).vocab_size
    config = {"text_config": {"vocab_size": size, "max_position_embeddings": 100_000}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class SevenPrompts(PlainPrompts):
    """Every response says 7."""

    def decode(self, token_ids: np.ndarray) -> str:
        return f"{len(token_ids)} tokens of thought</think>7"


@pytest.fixture
def all_seven(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of 7 are all that is asked."""
    made = Sums.make

    def make(self: Sums, key: str, content: tuple[int, ...]) -> Task:
        return replace(made(self, key, content), reference="7")

    monkeypatch.setattr(Sums, "make", make)


def judging_server(folder: Path) -> BadEngine:
    """Scores everything alike, when it answers at all."""
    tokenizer, server = load_tokenizer(str(folder / "tokenizer.json")), BadEngine()
    reply = [*tokenizer.encode(REPLY), tokenizer.chat_ids["<|im_end|>"]]

    def scores(answer: dict[str, Any]) -> dict[str, Any]:
        (choice,) = answer["choices"]
        choice["token_ids"], choice["finish_reason"] = reply, "stop"
        choice["logprobs"] = {"content": [{"token_id": token, "logprob": -1.0} for token in reply]}
        choice["weight_versions"] = [{"version": server.versions[0], "start": 0, "end": len(reply)}]
        return answer

    server.twist = scores
    return server


def environment(rubrics: dict[str, float] | None, weight: float = 1.0) -> EnvironmentConfig:
    source = TaskSourceConfig(family="sums", num_tasks=50, rubrics=rubrics, weight=weight)
    return EnvironmentConfig(tasks={"sums": source}, epochs=10, sandbox=sandbox_section())


def judged_by(folder: Path, **changes: Any) -> RolloutConfig:
    named = {"judge_url": "http://127.0.0.1:1", "judge_model": str(folder), "judge_version": 0}
    return rollout_config(**{**named, "judge_max_tokens": 500, **changes})


async def mend(server: BadEngine) -> None:
    """What hangs goes on hanging; what comes later is answered."""
    while not server.num_requests:
        await asyncio.sleep(0.01)
    server.hangs.clear()


def judged_groups(rollouts: Rollouts, server: BadEngine) -> list[Group]:
    """Groups of one step, judged as a run does it: `open_rubrics` and `open_judges` over HTTP."""

    async def use(rollouts: Rollouts) -> list[Group]:
        async with serving(server.app()) as url, asyncio.timeout(120):
            rollout = replace(rollouts.rollout, judge_url=url)
            rubrics = await open_rubrics(rollout, environment(rollouts.rubrics), tiny_vision_config())
            judges = open_judges(
                rollout.judge_timeout_s, 1, places=8, rubrics=rubrics.checks, recipes=rubrics.recipes
            )
            judges.check(rollouts.tasks.sampled(4))
            rollouts.judge = judges
            mended = asyncio.create_task(mend(server))
            try:
                return await rollouts.step(1)
            finally:
                mended.cancel()
                await judges.close()
                await rubrics.close()

    return rollouts.run(use)


@pytest.mark.usefixtures("all_seven")
@pytest.mark.parametrize("fault", ["answers 500", "hangs"])
def test_what_the_judging_server_fails_to_score_is_judged_again_and_never_0(
    fault: str, folder: Path, tmp_path: Path
) -> None:
    server = judging_server(folder)
    if fault == "hangs":
        server.hangs = {GENERATE}
        rollout, kind = judged_by(folder, judge_timeout_s=4.0, max_attempts=5), "timed_out"
    else:
        server.statuses = [500] * 18
        rollout, kind = judged_by(folder, judge_timeout_s=60.0), "raised"
    rollouts = Rollouts(tmp_path, rollout=rollout, prompts=SevenPrompts(), rubrics={"helpfulness": 0.2})
    groups = judged_groups(rollouts, server)

    ended = [each.verdict for group in groups for each in group.responses if each.ended]
    assert len(ended) == 6
    for verdict in ended:
        assert verdict is not None and verdict.kind in ("", "at the limit")
        assert verdict.reward == pytest.approx(0.0 if verdict.kind else REWARD)
        assert verdict.kind or verdict.parts["helpfulness/follows"] == 1.0
    assert sum(verdict.reward > 1 for verdict in ended if verdict) >= 2
    counts = rollouts.counts.take()
    assert sum(count for name, count in counts.items() if name.endswith(kind)) >= 1, counts
    signs = sign_figures(groups, SevenPrompts().decode)
    assert signs["hack/above_accuracy"] == 1.0 and signs["hack/many_answers"] == 0.0
    assert 0 < signs["hack/same"] < 1, "texts are those of the tokens"


@pytest.mark.usefixtures("all_seven")
def test_a_judging_server_that_never_scores_ends_the_run(folder: Path, tmp_path: Path) -> None:
    server = judging_server(folder)
    server.statuses = [500] * 10_000
    rollouts = Rollouts(
        tmp_path, rollout=judged_by(folder), prompts=SevenPrompts(), rubrics={"helpfulness": 0.2}
    )
    with pytest.raises(K25Error, match=rf"{JUDGE}: given up after 3 tries.*status 500"):
        judged_groups(rollouts, server)


def opened(rollout: RolloutConfig, wanted: EnvironmentConfig, server: BadEngine | None = None) -> Rubrics:
    """What `open_rubrics` gives, or raises."""

    async def use() -> Rubrics:
        async with serving((server or BadEngine()).app()) as url:
            there = rollout if server is None else replace(rollout, judge_url=url)
            return await open_rubrics(there, wanted, tiny_vision_config())

    return asyncio.run(use())


@pytest.mark.parametrize("wanted", [environment(None), environment({"nice": 1.0}, weight=0.0)])
def test_without_rubrics_nothing_is_connected(wanted: EnvironmentConfig) -> None:
    assert opened(rollout_config(), wanted).checks == {}


def test_what_cannot_judge_is_named_before_the_run(folder: Path, tmp_path: Path) -> None:
    wanted = environment({"helpfulness": 0.2})
    with pytest.raises(
        ConfigError, match=r"environment\.tasks\.sums\.rubrics: nice: no such set.*\n.*honesty"
    ):
        opened(judged_by(folder), environment({"nice": 1.0}))
    with pytest.raises(ConfigError, match=r"rollout\.judge_model=.*config\.json describes no model"):
        opened(judged_by(tmp_path), wanted)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(ConfigError, match=r"has neither tiktoken\.model nor tokenizer\.json"):
        opened(judged_by(tmp_path), wanted)
    with pytest.raises(ConfigError, match=r"rollout\.judge_version=3: http://127.* serves version 0"):
        opened(judged_by(folder, judge_version=3), wanted, judging_server(folder))
    with pytest.raises(K25Error, match=r"vLLM at http://127\.0\.0\.1:1"):
        opened(judged_by(folder), wanted)
