"""The session of one response: what an agent asks becomes turns of the policy.

    Asked ─► tree: what of it is on record ─► the rest is encoded ─► Turns.turn ─► Answer ─► tree

Any number of requests may be in flight (sub-agents); each is put where its history says. A session ends with
its rollout.
"""

import json
import secrets
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from k25_train.environments.environment import Action
from k25_train.errors import DataError, K25Error, RolloutError
from k25_train.rollout.engines.base import EngineError, FinishReason
from k25_train.rollout.gateway.conversation import (
    Answer,
    Asked,
    Call,
    Finish,
    Kind,
    Message,
    RefusedError,
    TokenText,
    digest_of,
)
from k25_train.rollout.gateway.rendering import as_chat, observed_of
from k25_train.rollout.gateway.repeats import Repeats
from k25_train.rollout.gateway.tree import Drawn, Found, Tree
from k25_train.rollout.prompts import Prompting
from k25_train.rollout.turns import NoRoomError, Place, Turn, Turns

MOST_IN_FLIGHT = 256
"""Requests of one session at once. Our choice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorder:
    """One response in the making, as a session needs it."""

    name: str
    """Of its task, for messages."""
    turns: Turns
    """Has turns made, and records them."""
    prompts: Prompting
    """Between messages and ids."""
    ids_until: Callable[[Place], np.ndarray]
    """[n] int32: ids of a branch up to a place, every placeholder included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionRules:
    """What a session's agent may do."""

    thinking: bool
    """Whether each turn begins with an open thought."""
    max_turns: int
    """Turns of the response."""
    strict: bool = False
    """Whether a history that was rewritten is refused; else it forks."""


class AgentSession:
    """See the head of this file."""

    def __init__(self, recorder: Recorder, rules: SessionRules) -> None:
        self._recorder, self._rules = recorder, rules
        self._tree = Tree()
        self._kept: dict[str, tuple[Message, ...]] = {}
        self._num_turns = self._in_flight = 0
        self.repeats = Repeats()
        """Its requests."""
        self.counts: Counter[str] = Counter()
        """What has happened: turns, forks, refusals by kind, ignored keys."""
        self._latest: tuple[Message, ...] = ()
        self.fault: K25Error | None = None
        """What ended it for good: no engine gave an answer. Its rollout has to raise it."""

    async def answer(self, asked: Asked) -> Answer:
        """A turn. Raises `RefusedError` where there is none to be had."""
        self.counts.update(f"ignored/{key}" for key in asked.ignored)
        if self._in_flight >= MOST_IN_FLIGHT:
            raise RefusedError(Kind.too_many, f"{MOST_IN_FLIGHT} requests of this session are in flight")
        self._in_flight += 1
        try:
            return await self._answer(self._whole(asked))
        except RefusedError as error:
            self.counts[f"refused/{error.kind.name}"] += 1
            raise
        finally:
            self._in_flight -= 1

    @property
    def conversation(self) -> tuple[dict[str, Any], ...]:
        """What the latest answer ends, as conversations have it; images are where their parts are."""
        return tuple(as_chat(message, {}) for message in self._latest)

    @property
    def has_asked(self) -> bool:
        """Whether a turn was asked for, answered or not."""
        return self._num_turns > 0

    @property
    def has_no_turns_left(self) -> bool:
        """Whether another turn would be refused."""
        return self.counts["turns"] >= self._rules.max_turns

    async def close(self) -> None:
        """End what is in flight."""
        await self.repeats.close()

    def _whole(self, asked: Asked) -> Asked:
        """With what comes before it. Raises `RefusedError` for an unknown earlier answer."""
        earlier: tuple[Message, ...] = ()
        if asked.previous:
            if asked.previous not in self._kept:
                raise RefusedError(
                    Kind.unknown,
                    f"previous_response_id={asked.previous}: this session has given no such answer",
                    key="previous_response_id",
                )
            earlier = self._kept[asked.previous]
        return replace(asked, messages=earlier + asked.messages)

    async def _answer(self, asked: Asked) -> Answer:
        # 1. Where it goes on.
        system = (Message(role="system", parts=(asked.instructions,)),) if asked.instructions else ()
        whole = replace(asked, messages=system + asked.messages)
        if whole.messages[-1].role == "assistant":
            raise RefusedError(
                Kind.invalid,
                "the conversation ends with the assistant, whose words are not continued: end it with a "
                "message of the user, or a tool's result",
                code="invalid_value",
                key="messages",
            )
        root = digest_of([list(whole.tools), self._rules.thinking])
        found = self._tree.find(root, whole.messages)
        self._check(found)

        # 2. A turn of the policy.
        number, self._num_turns = self._num_turns, self._num_turns + 1
        turn = await self._turn(whole, found)

        # 3. On record here, under the names that the client knows.
        action = self._recorder.prompts.action(turn.token_ids, thinking=self._rules.thinking)
        calls = tuple(
            Call(id=f"call_{number}_{at}", name=call.name, arguments=_json(call.arguments))
            for at, call in enumerate(action.calls)
        )
        said = (action.content,) if action.content else ()
        message = Message(role="assistant", parts=said, calls=calls, reasoning=action.reasoning)
        drawn = Drawn(
            place=turn.place,
            last_id=int(turn.token_ids[-1]),
            call_ids=tuple(call.id for call in calls),
            policy_ids=tuple(call.id for call in action.calls),
        )
        self._tree.add(root, whole.messages, message, drawn)
        self._latest = (*whole.messages, message)
        self.counts["turns"] += 1
        self.counts["forks"] += found.is_fork
        answer = self._told(whole, found, turn, message, number, action)
        if asked.is_kept:
            self._kept[answer.id] = (*asked.messages, message)
        return answer

    def _check(self, found: Found) -> None:
        # Those in flight count, this one included.
        if self.counts["turns"] + self._in_flight > self._rules.max_turns:
            raise RefusedError(
                Kind.overflow,
                f"the rollout has had its {self._rules.max_turns} turns (rollout.manager.max_turns)",
            )
        if found.is_fork and self._rules.strict:
            raise RefusedError(
                Kind.invalid,
                "the history is not the one that was given out, which this session does not allow (strict): "
                "send it as it was, and what is new behind it",
                code="history_rewritten",
                key="messages",
            )

    async def _turn(self, asked: Asked, found: Found) -> Turn:
        """Raises `RefusedError` for whatever is wrong."""
        try:
            observed = await observed_of(
                self._recorder.prompts, self._recorder.name, asked, found, self._rules.thinking
            )
        except NoRoomError as error:
            raise RefusedError(Kind.overflow, str(error), key="messages") from error
        except RolloutError as error:
            raise RefusedError(Kind.invalid, str(error), code="invalid_value", key="messages") from error
        try:
            turn = await self._recorder.turns.turn(observed, found.after, max_tokens=asked.max_tokens)
        except NoRoomError as error:
            raise RefusedError(Kind.overflow, str(error), key="messages") from error
        except DataError as error:
            raise RefusedError(Kind.invalid, f"an image cannot be read: {error}", key="messages") from error
        except (EngineError, RolloutError) as error:
            self.fault = self.fault or error
            raise RefusedError(Kind.no_engine, f"no engine gives an answer: {error}") from error
        if not len(turn.token_ids):
            raise RefusedError(
                Kind.overflow,
                "the conversation leaves no room for an answer (rollout.max_tokens): shorten it",
                key="messages",
            )
        return turn

    def _told(
        self, asked: Asked, found: Found, turn: Turn, message: Message, number: int, action: Action
    ) -> Answer:
        num_prompt = turn.place.num_tokens - len(turn.token_ids)
        behind = self._recorder.ids_until(turn.place)[:num_prompt] if asked.wants_ids else _NO_IDS
        tokens: tuple[TokenText, ...] = ()
        if asked.wants_logprobs:
            decode = self._recorder.prompts.decode
            drawn = zip(turn.token_ids.tolist(), turn.logprobs.tolist(), strict=True)
            tokens = tuple(TokenText(text=decode([token]), logprob=value) for token, value in drawn)
        finish = Finish.calls if action.calls else Finish.stop
        return Answer(
            number=number,
            id=secrets.token_hex(12),
            created=int(time.time()),
            message=message,
            finish=Finish.length if turn.finish_reason is FinishReason.length else finish,
            prompt_tokens=num_prompt,
            cached_tokens=found.after.num_tokens,
            token_ids=turn.token_ids,
            logprobs=turn.logprobs,
            prompt_ids=behind,
            tokens=tokens,
        )


_NO_IDS = np.zeros(0, np.int32)


def _json(arguments: object) -> str:
    return json.dumps(arguments, ensure_ascii=False)
