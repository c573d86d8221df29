"""Which engine rolls out, how it samples, and how weights get there. Values are our choice."""

from dataclasses import dataclass
from enum import Enum

from k25_train.config.basics import not_negative
from k25_train.config.rollout_manager import ManagerConfig
from parallel.config import Problem, not_positive


class EngineKind(Enum):
    """What generates."""

    in_process = "in_process"
    """transformers' model in the first rank's process, without a server."""
    vllm = "vllm"
    """vLLM servers over HTTP."""
    sglang = "sglang"
    """SGLang servers over HTTP."""


class Transport(Enum):
    """How weights get from the trainer to the engines."""

    shared_memory = "shared_memory"
    """safetensors files in memory that both see; the in-process engine takes tensors themselves."""
    nccl = "nccl"
    """Broadcast over NCCL, CUDA only."""
    checkpoint_engine = "checkpoint_engine"
    """Moonshot's checkpoint-engine, CUDA only."""


class EngineWeights(Enum):
    """Number format of the weights that engines get. The engine in process computes in `train.dtype`."""

    float32 = "float32"
    """As a float32 run computes with them: nothing is rounded, and with `model.quantization=int4_qat` experts
    have the values of their codes."""
    bf16 = "bf16"
    """bfloat16, as a bfloat16 run computes."""
    int4 = "int4"
    """Routed experts in INT4, by the rule that they are trained with, and all else in `train.dtype`."""


@dataclass(slots=True, kw_only=True)
class RolloutConfig:
    """How responses are generated."""

    engine: EngineKind
    """What generates."""
    urls: list[str]
    """Base URLs of the servers; none for the engine in process."""
    weights: EngineWeights
    """Number format of the weights that engines get. The engine in process computes in `train.dtype`."""
    transport: Transport
    """How they get there."""
    max_prompt_tokens: int
    """Longest prompt, placeholders of images included; longer ones are refused by name."""
    max_tokens: int
    """Longest response; one that reaches it ends there (`finish_reason` length)."""
    temperature: float
    """Of sampling. Only 1 can be trained on: ratios are of the model's own probabilities."""
    max_running: int
    """Responses that one engine generates at once."""
    threads: int
    """Threads of the engine in process; 0 for as many as torch has."""
    request_timeout_s: float
    """Seconds after which a request without an answer counts as failed."""
    max_attempts: int
    """Tries of a response before its task is given up, which ends the run with its name."""
    judge_timeout_s: float
    """Seconds after which a judge whose turn has come, and who gave no verdict, counts as failed."""
    judge_url: str | None
    """Base URL of the vLLM server whose model judges by `environment.tasks.NAME.rubrics`; null for none."""
    judge_model: str | None
    """Folder of what it serves: `config.json` and the vocabulary."""
    judge_version: int | None
    """Label of its weights (`serve --label`): another one would give the same response another reward."""
    judge_max_tokens: int
    """Longest reply of the judging model, thoughts included."""
    update_timeout_s: float
    """Seconds after which an engine that has not taken new weights is fenced off."""
    probe_sequences: int
    """Sequences whose log-probabilities are compared with the trainer's after every push."""
    probe_tolerance: float
    """Largest difference of a log-probability of the probe, in nats; beyond it the engine is fenced off.
    float32 keeps 1e-4. In bfloat16 tokens that the model finds improbable differ by whole nats where a router
    chooses otherwise (3 on the tiny model), so a run in it needs what its own first pushes show."""
    eval_tasks: int
    """Held-out tasks of one evaluation, each answered once."""
    manager: ManagerConfig
    """How many rollouts live at once, where, and how long each phase may take."""

    def problems(self) -> list[Problem]:
        """Every rule of this section that is broken."""
        names = (
            "max_prompt_tokens", "max_tokens", "temperature", "max_running", "request_timeout_s",
            "max_attempts", "judge_timeout_s", "judge_max_tokens", "update_timeout_s", "probe_sequences",
            "probe_tolerance",
        )  # fmt: skip
        found = not_positive(self, names) + not_negative(self, ("threads", "eval_tasks"))
        if self.temperature > 0 and self.temperature != 1:
            rule = "must be 1: what is trained are ratios of the model's own probabilities, so its responses "
            rule += "have to be drawn from these"
            found.append(Problem("temperature", self.temperature, rule, "use rollout.temperature=1.0"))
        is_embedded = self.engine is EngineKind.in_process
        if is_embedded and self.urls:
            rule = "must be empty with rollout.engine=in_process, which has no server"
            found.append(Problem("urls", self.urls, rule, "use rollout.urls=[], or rollout=vllm"))
        if not is_embedded and not self.urls:
            rule = f"must name the servers of rollout.engine={self.engine.value}"
            remedy = "e.g. rollout.urls=[http://node1:8000]; `python -m k25_train.rollout serve` starts one"
            found.append(Problem("urls", self.urls, rule, remedy))
        found += [
            Problem("urls", url, "must be http:// or https:// URLs", "e.g. http://node1:8000")
            for url in self.urls
            if not url.startswith(("http://", "https://"))
        ]
        found += [problem.under("manager") for problem in self.manager.problems()]
        return found + self._problems_of_judge()

    def _problems_of_judge(self) -> list[Problem]:
        """The judging model is named whole, or not at all."""
        named = {
            "judge_url": self.judge_url,
            "judge_model": self.judge_model,
            "judge_version": self.judge_version,
        }
        given = [name for name, value in named.items() if value is not None]
        rule = "must be given together with the other two of rollout.judge_url, judge_model and judge_version"
        remedy = (
            "name the server, the folder that it serves and the label of its weights, or use null for all"
        )
        found = [Problem(name, None, rule, remedy) for name in named if given and name not in given]
        if self.judge_url is not None and not self.judge_url.startswith(("http://", "https://")):
            rule = "must be an http:// or https:// URL"
            found.append(Problem("judge_url", self.judge_url, rule, "e.g. http://node2:8000"))
        return found
