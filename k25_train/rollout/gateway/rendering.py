"""From messages of an API to those that are encoded, and to what the policy sees of them."""

import asyncio
from collections.abc import Sequence
from typing import Any

from k25_train.rollout.gateway.conversation import Asked, Message
from k25_train.rollout.gateway.tree import Found
from k25_train.rollout.prompts import Prompting
from k25_train.rollout.turns import Observed

LONG_TEXT = 20_000
"""Characters from which on encoding is left to a thread: about 5 ms. Our choice."""


async def observed_of(prompts: Prompting, name: str, asked: Asked, found: Found, thinking: bool) -> Observed:
    """What the policy gets to see in front of its next turn.

    Args:
        prompts: encodes it.
        name: of the task, for messages.
        asked: the conversation.
        found: what of it is on record.
        thinking: whether it ends with an open thought.

    Raises `RolloutError` for messages that are no conversation, `NoRoomError` for too long ones.
    """
    messages = asked.messages[found.num_known :]
    media = tuple(image for message in messages for image in message.media)
    names = policy_ids(messages, found)
    told = [as_chat(message, names) for message in messages]

    def encode() -> Observed:
        if found.drawn is None:
            return prompts.opening(name, told, media, asked.tools, thinking=thinking)
        observed = prompts.following(name, told, media, thinking=thinking)
        if found.drawn.last_id == prompts.stop_ids[0]:
            return observed
        # The turn was cut, or ended otherwise: its message is ended for it.
        return Observed((prompts.stop_ids[0], *observed.token_ids), observed.media)

    is_long = sum(len(message.text) for message in messages) > LONG_TEXT
    return await asyncio.to_thread(encode) if is_long else encode()


def policy_ids(messages: Sequence[Message], found: Found) -> dict[str, str]:
    """Id of a call as the client knows it -> as the policy wrote it.

    Clients that rename ids keep the order of results: those right behind an answer are its calls'.
    """
    names = {
        client: own
        for drawn in found.path
        for client, own in zip(drawn.call_ids, drawn.policy_ids, strict=True)
    }
    if found.drawn is not None:
        calls = iter(found.drawn.policy_ids)
        for message in messages:
            own = next(calls, None)
            if message.role != "tool" or own is None:
                break
            names.setdefault(message.call_id, own)
    return names


def as_chat(message: Message, names: dict[str, str]) -> dict[str, Any]:
    """A message as conversations have it (`data/chat/messages.py`); images are where their parts are."""
    parts: list[dict[str, Any]] = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": "image"}
        for part in message.parts
    ]
    told: dict[str, Any] = {"role": message.role, "content": parts if message.media else message.text}
    if message.role == "tool":
        told["tool_call_id"] = names.get(message.call_id, message.call_id)
    if message.role == "assistant":
        told["loss"] = False
        if message.reasoning:
            told["reasoning_content"] = message.reasoning
        if message.calls:
            told["tool_calls"] = [
                {
                    "id": names.get(call.id, call.id),
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in message.calls
            ]
    return told
