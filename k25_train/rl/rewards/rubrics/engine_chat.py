"""A rollout engine as one that answers messages: rubrics are judged over the very protocol that rolls out."""

from collections.abc import Mapping, Sequence
from typing import Any

from k25_train.environments.environment import Action, Tool
from k25_train.rollout.engines.base import Engine, EngineError, FinishReason, Request, Sampling
from k25_train.rollout.prompts import Prompts


class EngineChat:
    """Answers messages with an engine; a `ChatEngine`."""

    def __init__(self, engine: Engine, prompts: Prompts, max_tokens: int, max_prompt_tokens: int) -> None:
        """`max_tokens`: longest reply. Each token is the most probable one: equal requests, equal scores.
        `max_prompt_tokens`: longest request, what the engine's context leaves."""
        self._engine = engine
        self._prompts = prompts
        self._max_tokens = max_tokens
        self._max_prompt_tokens = max_prompt_tokens

    async def version(self) -> str:
        """See `ChatEngine`: the optimizer step of the weights."""
        return str((await self._engine.state()).version)

    async def generate(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """See `ChatEngine`. Raises EngineError, also for a request that is too long, and for a reply
        that reaches its limit."""
        return self._prompts.decode(await self._drawn(messages, ()))

    async def __call__(self, messages: tuple[Mapping[str, Any], ...], tools: tuple[Tool, ...] = ()) -> Action:
        """See `Chat`. Raises as `generate`."""
        return self._prompts.action(await self._drawn(messages, tools), thinking=False)

    async def _drawn(self, messages: Sequence[Mapping[str, Any]], tools: tuple[Tool, ...]) -> Sequence[int]:
        """Ids of the reply. Raises as `generate`."""
        prompt_ids = self._prompts.opening("judge", messages, (), tools, thinking=False).token_ids
        if len(prompt_ids) > self._max_prompt_tokens:
            raise EngineError(
                f"{self._engine.name}: its context has room for {self._max_prompt_tokens} tokens before a "
                f"reply, and an answer to be judged takes {len(prompt_ids)}: lower rollout.judge_max_tokens "
                "or rollout.max_tokens, or use a model with a longer context"
            )
        request = Request(
            key="rubric",
            prompt_ids=prompt_ids,
            sampling=Sampling(
                max_tokens=self._max_tokens,
                temperature=0.0,
                seed=0,
                stop_ids=self._prompts.stop_ids,
                forbidden_ids=self._prompts.forbidden_ids,
            ),
        )
        generated = await self._engine.generate(request)
        if generated.finish_reason is not FinishReason.stop:
            raise EngineError(
                f"{self._engine.name}: its reply did not end ({generated.finish_reason.value}) after "
                f"{len(generated.token_ids)} tokens"
            )
        return [int(token) for token in generated.token_ids]
