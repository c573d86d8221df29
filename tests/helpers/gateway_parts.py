"""A gateway before an engine that says what a test wants, token by token as no tokenizer would cut it."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from k25_train.compose.resolve import compose
from k25_train.config.rollout import RolloutConfig
from k25_train.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from k25_train.rollout.asking import Asking
from k25_train.rollout.engines.base import EngineError, FinishReason, Generated, Request, VersionSpan
from k25_train.rollout.engines.served_model import ServedModel
from k25_train.rollout.gateway.recording import recorder_of
from k25_train.rollout.gateway.registry import Access, Registry
from k25_train.rollout.gateway.server import run_gateway
from k25_train.rollout.gateway.sessions import AgentSession, SessionRules
from k25_train.rollout.prompts import Prompts
from k25_train.rollout.records import Record
from k25_train.rollout.response_records import apply_record
from k25_train.rollout.session import Identity, Session
from k25_train.rollout.trajectory import Response
from k25_train.rollout.work import Round
from tests.helpers.tiny_shards import VOCAB_SIZE, make_text

SPECIAL = re.compile(r"(<\|[a-z_]+\|>|</?think>)")
END = "<|im_end|>"
Says = Callable[[str], str]
"""The prompt as text -> what is said, special tokens by name; without `END` it is cut at its limit."""


def call_text(name: str, arguments: str, number: int = 0, said: str = "") -> str:
    """A turn with a call of a tool."""
    return (
        f"{said}<|tool_calls_section_begin|><|tool_call_begin|>functions.{name}:{number}"
        f"<|tool_call_argument_begin|>{arguments}<|tool_call_end|><|tool_calls_section_end|>{END}"
    )


@cache
def _sections() -> tuple[RolloutConfig, Any]:
    config = compose(["experiment=rl_smoke"])
    assert config.rollout is not None
    return config.rollout, config.model.vision


@dataclass(slots=True)
class Exchange:
    """What an engine was asked and what it answered, as it saw it."""

    request: Request
    prompt_ids: np.ndarray
    token_ids: np.ndarray
    logprobs: np.ndarray


class SayingEngine:
    """Engines as one (`asking.Generates`), which say what they are told to, letter by letter."""

    num_serving = 1

    def __init__(self, tokenizer: Tokenizer, model: ServedModel, says: Says, pause_s: float = 0.0) -> None:
        self._tokenizer, self._model = tokenizer, model
        self.says = says
        self.pause_s = pause_s
        self.exchanges: list[Exchange] = []
        self.num_cancelled = 0
        self.fails = False
        self.letters: dict[str, list[int]] = {}

    async def generate(self, request: Request) -> Generated:
        """See `Engine`."""
        try:
            await asyncio.sleep(self.pause_s)
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        if self.fails:
            raise EngineError("engine 0: status 500")
        prompt = self._model.expanded(request.prompt_ids, request.images)
        tokens = self.encode(self.says(self._tokenizer.decode(list(request.prompt_ids))))
        tokens = tokens[: request.sampling.max_tokens]
        is_whole = tokens[-1] in request.sampling.stop_ids
        number = len(self.exchanges)
        logprobs = -np.random.default_rng(number).random(len(tokens), np.float32)
        drawn = np.array(tokens, np.int32)
        self.exchanges.append(Exchange(request, prompt, drawn, logprobs))
        return Generated(
            prompt_ids=prompt,
            token_ids=drawn,
            logprobs=logprobs,
            spans=(VersionSpan(3, 0, len(tokens)),),
            finish_reason=FinishReason.stop if is_whole else FinishReason.length,
        )

    def encode(self, text: str) -> list[int]:
        """Ids of a text, special tokens by their names, all else letter by letter."""
        ids: list[int] = []
        for piece in SPECIAL.split(text):
            if SPECIAL.fullmatch(piece):
                ids.append(self._tokenizer.chat_ids[piece])
                continue
            for letter in piece:
                if letter not in self.letters:
                    self.letters[letter] = self._tokenizer.encode(letter)
                ids += self.letters[letter]
        return ids


@dataclass(slots=True, kw_only=True)
class Trial:
    """A response that an agent makes."""

    access: Access
    session: AgentSession
    recorded: Session
    """Where turns are recorded."""
    response: Response
    media: dict[str, bytes]
    url: str
    """Of its session, without `/v1`."""

    @property
    def drawn(self) -> list[list[int]]:
        """What each branch trains."""
        return [each.token_ids[each.own].tolist() for each in self.response.branches]


@dataclass(slots=True, kw_only=True)
class Stage:
    """A gateway that serves."""

    url: str
    registry: Registry
    engine: SayingEngine
    prompts: Prompts
    config: RolloutConfig
    vocab_size: int
    counts: list[str] = field(default_factory=list)

    def open(self, name: str = "task 7", **rules: Any) -> Trial:
        """A session for an agent."""
        response, media = Response(), dict[str, bytes]()

        def append(record: Record) -> None:
            apply_record(record, response, media)

        session = Session(
            Identity(task=name, group=0, sample=0, seed=11),
            response,
            media,
            asking=Asking(self.config, self.vocab_size, self.engine, self.counts.append),
            vocabulary=self.prompts,
            allowed=Round(number=0),
            append=append,
        )
        chosen = SessionRules(**({"thinking": False, "max_turns": 100} | rules))
        agent = AgentSession(recorder_of(session, self.prompts), chosen)
        access = self.registry.admit(agent)
        url = f"{self.url}/sessions/{access.session_id}"
        return Trial(access=access, session=agent, recorded=session, response=response, media=media, url=url)

    def mismatches(self, trials: Sequence[Trial]) -> list[str]:
        """Where what is trained is not what the engine saw and drew, each token exactly once."""
        found = []
        exchanges: dict[bytes, list[Exchange]] = {}
        for exchange in self.engine.exchanges:
            whole = np.concatenate([exchange.prompt_ids, exchange.token_ids])
            exchanges.setdefault(whole.tobytes(), []).append(exchange)
        num_trained = 0
        for trial in trials:
            for number, branch in enumerate(trial.response.branches):
                where = f"{trial.access}, branch {number}"
                if branch.token_ids.tobytes() not in exchanges:
                    found.append(f"{where}: no engine has seen it")
                for start, stop in _runs(branch.own):
                    num_trained += 1
                    same = exchanges.get(branch.token_ids[:stop].tobytes(), [])
                    logprobs = branch.logprobs[start:stop]
                    if not any(
                        len(each.prompt_ids) == start and np.array_equal(each.logprobs, logprobs)
                        for each in same
                    ):
                        found.append(f"{where}: tokens {start} to {stop} were not drawn like that")
        if num_trained != len(self.engine.exchanges):
            found.append(f"{num_trained} turns are trained, {len(self.engine.exchanges)} were drawn")
        return found


def _runs(mask: np.ndarray) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def load_tiny_tokenizer(folder: Path) -> Tokenizer:
    """A vocabulary with the tokens of conversations."""
    path = folder / "tokenizer.json"
    if not path.exists():
        train_tokenizer([make_text(400, seed) for seed in range(4)], VOCAB_SIZE, path, chat_tokens=True)
    return load_tokenizer(path)


@asynccontextmanager
async def gateway_stage(
    folder: Path, says: Says, pause_s: float = 0.0, **limits: Any
) -> AsyncIterator[Stage]:
    """A gateway on localhost, and its parts."""
    tokenizer = load_tiny_tokenizer(folder)
    section, vision = _sections()
    values = {name: getattr(section, name) for name in RolloutConfig.__dataclass_fields__}
    values |= {"max_prompt_tokens": 100_000, "max_tokens": 100_000, "max_attempts": 2} | limits
    config = RolloutConfig(**values)
    model = ServedModel(vocab_size=tokenizer.vocab_size, media_pad=tokenizer.media_pad, vision=vision)
    prompts = Prompts(tokenizer, "tokenizer.json", model, config.max_prompt_tokens)
    registry = Registry()
    runner, url = await run_gateway(registry, "127.0.0.1", [0])
    try:
        yield Stage(
            url=url,
            registry=registry,
            engine=SayingEngine(tokenizer, model, says, pause_s),
            prompts=prompts,
            config=config,
            vocab_size=tokenizer.vocab_size,
        )
    finally:
        await registry.close_all()
        await runner.cleanup()
