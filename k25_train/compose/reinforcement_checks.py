"""Rules of reinforcement learning that read more than one section, one small function each."""

from collections.abc import Callable

from k25_train.config.algorithm import AlgorithmConfig, OtherVersions, PolicyForm
from k25_train.config.basics import DType
from k25_train.config.environment import EnvironmentConfig
from k25_train.config.model import ModelConfig, Quantization
from k25_train.config.rollout import EngineWeights, RolloutConfig
from k25_train.config.training import TrainConfig
from parallel.config import ParallelismConfig, Problem


def sections_come_together(
    algorithm: AlgorithmConfig | None, rollout: RolloutConfig | None, environment: EnvironmentConfig | None
) -> list[Problem]:
    """Reinforcement learning has an algorithm, something that rolls out, and tasks."""
    sections = {"algorithm": algorithm, "rollout": rollout, "environment": environment}
    missing = [name for name, section in sections.items() if section is None]
    if len(missing) in (0, len(sections)):
        return []
    given = ", ".join(name for name in sections if name not in missing)
    rule = f"must be given together with {given}"
    return [Problem(name, None, rule, f"choose one, {name}=NAME, or leave all three out") for name in missing]


def responses_fit_sequences(
    algorithm: AlgorithmConfig | None, rollout: RolloutConfig | None, train: TrainConfig
) -> list[Problem]:
    """A prompt with its response is a document, which is never cut."""
    if algorithm is None or rollout is None:
        return []
    longest = rollout.max_prompt_tokens + rollout.max_tokens
    if longest <= train.seq_len:
        return []
    rule = f"must leave room for a prompt: with rollout.max_prompt_tokens={rollout.max_prompt_tokens}, "
    rule += f"{longest} tokens do not fit train.seq_len={train.seq_len}"
    remedy = f"use train.seq_len={longest} or more, or shorter responses"
    return [Problem("rollout.max_tokens", rollout.max_tokens, rule, remedy)]


def whole_responses_have_one_rank(
    algorithm: AlgorithmConfig | None, parallelism: ParallelismConfig
) -> list[Problem]:
    """The form with the log-ratio of a whole response needs all its tokens on one rank."""
    if algorithm is None or algorithm.form is PolicyForm.token or parallelism.cp == 1:
        return []
    rule = (
        f"needs parallelism.cp=1, not {parallelism.cp}: ranks that share a response know parts of its ratio"
    )
    remedy = "use algorithm.form=token, or parallelism.cp=1"
    return [Problem("algorithm.form", algorithm.form.value, rule, remedy)]


def engines_have_the_trainers_weights(
    rollout: RolloutConfig | None, model: ModelConfig, train: TrainConfig
) -> list[Problem]:
    """What is rounded on the way to engines, the trainer computes with, too; else ratios would be of two
    models, and the probe would take the engines' weights for wrong ones."""
    if rollout is None:
        return []
    if rollout.weights is EngineWeights.int4 and model.quantization is not Quantization.int4_qat:
        rule = (
            f"needs model.quantization={Quantization.int4_qat.value}: the trainer's experts are not rounded"
        )
        remedy = f"use model.quantization={Quantization.int4_qat.value}, or rollout.weights=float32"
    elif rollout.weights is EngineWeights.bf16 and train.dtype is not DType.bfloat16:
        rule = f"needs train.dtype={DType.bfloat16.value}: the trainer rounds no weights"
        remedy = "use rollout.weights=float32"
    else:
        return []
    return [Problem("rollout.weights", rollout.weights.value, rule, remedy)]


def only_phases_are_cut(algorithm: AlgorithmConfig | None) -> list[Problem]:
    """Partial rollouts go on in the next phase, and asynchronous ones have no phases."""
    if algorithm is None or algorithm.token_cap is None or not algorithm.max_staleness:
        return []
    rule = f"needs algorithm.max_staleness=0, not {algorithm.max_staleness}: rollouts that go on during "
    rule += "training are never cut, and take new weights between two tokens"
    remedy = "use algorithm.token_cap=null, or algorithm.max_staleness=0"
    return [Problem("algorithm.token_cap", algorithm.token_cap, rule, remedy)]


def every_step_of_a_phase_trains(algorithm: AlgorithmConfig | None) -> list[Problem]:
    """All steps of a phase but the first have tokens of earlier weights alone."""
    if algorithm is None or algorithm.other_versions is OtherVersions.train:
        return []
    if algorithm.steps_per_rollout == 1:
        return []
    rule = f"needs algorithm.steps_per_rollout=1, not {algorithm.steps_per_rollout}: later steps of a phase "
    rule += "have tokens of earlier weights alone, and would learn nothing from rewards"
    remedy = "use algorithm.other_versions=train, or algorithm.steps_per_rollout=1"
    return [Problem("algorithm.other_versions", algorithm.other_versions.value, rule, remedy)]


def rubrics_have_a_judge(
    rollout: RolloutConfig | None, environment: EnvironmentConfig | None
) -> list[Problem]:
    """Rubrics are scored by a model of their own: the policy's changes, and would judge itself."""
    if rollout is None or environment is None or rollout.judge_url is not None:
        return []
    return [
        Problem(
            f"environment.tasks.{name}.rubrics",
            sorted(source.rubrics),
            "needs rollout.judge_url, the server whose model scores them",
            "start one (`python -m k25_train.rollout serve`) and name it, or use null",
        )
        for name, source in environment.tasks.items()
        if source.rubrics
    ]


RULES: tuple[Callable[..., list[Problem]], ...] = (
    sections_come_together,
    responses_fit_sequences,
    whole_responses_have_one_rank,
    only_phases_are_cut,
    every_step_of_a_phase_trains,
    engines_have_the_trainers_weights,
    rubrics_have_a_judge,
)
