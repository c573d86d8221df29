"""The SDKs of OpenAI and Anthropic, as they are, act as the policy; what they make is trained as drawn."""

import asyncio
import base64
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from tests.helpers.gateway_parts import END, Stage, Trial, call_text, gateway_stage
from tests.helpers.sampled_engine import picture

TOOL = {
    "name": "look_up",
    "description": "Looks a word up.",
    "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
}
CALL = call_text("look_up", '{"word":  "sun"}', said="Let me look. ")
IMAGE = base64.b64encode(picture(56, 56, 1)).decode()


def says(prompt: str) -> str:
    """A call first, then an answer; the number of turns is in it, so that turns differ."""
    if "Return of" not in prompt:
        return CALL
    return f"It shines, {prompt.count('Return of')}.{END}"


def run(folder: Path, test: Callable[[Stage], Awaitable[None]], **settings: Any) -> None:
    async def staged() -> None:
        async with gateway_stage(folder, settings.pop("says", says), **settings) as stage:
            async with asyncio.timeout(60):
                await test(stage)

    asyncio.run(staged())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vocabulary")


def check(stage: Stage, trial: Trial, num_branches: int = 1) -> None:
    assert stage.mismatches([trial]) == []
    assert len(trial.response.branches) == num_branches


async def chat_turn(
    client: openai.AsyncOpenAI, messages: list[Any], stream: bool, **more: Any
) -> dict[str, Any]:
    """The assistant's message, as the SDK has it."""
    tools: Any = [{"type": "function", "function": TOOL}]
    arguments: Any = {"model": "policy", "messages": messages, "tools": tools, **more}
    if not stream:
        done = await client.chat.completions.create(**arguments)
        return done.choices[0].message.model_dump(exclude_none=True)
    async with client.chat.completions.stream(**arguments) as events:
        async for _ in events:
            pass
        final = await events.get_final_completion()
    message = final.choices[0].message.model_dump(exclude_none=True)
    for call in message.get("tool_calls", ()):
        call["function"].pop("parsed_arguments", None)
    return message


@pytest.mark.parametrize("stream", [False, True])
def test_chat_completions(folder: Path, stream: bool) -> None:
    async def test(stage: Stage) -> None:
        trial = stage.open()
        client = openai.AsyncOpenAI(base_url=f"{stage.url}/v1", api_key=trial.access.key)
        image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{IMAGE}"}}
        messages: list[Any] = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [image, {"type": "text", "text": "What of the sun?"}]},
        ]
        message = await chat_turn(client, messages, stream)
        assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == {"word": "sun"}
        result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "A star."}
        messages += [message, result]
        final = await chat_turn(client, messages, stream)
        assert final["content"] == "It shines, 1."
        await chat_turn(client, [*messages, final, {"role": "user", "content": "Sure?"}], stream)
        check(stage, trial)
        assert len(trial.media) == 1

    run(folder, test)


@pytest.mark.parametrize("stream", [False, True])
def test_responses(folder: Path, stream: bool) -> None:
    async def turn(client: openai.AsyncOpenAI, **arguments: Any) -> Any:
        tools: Any = [{"type": "function", "strict": False, **TOOL}]
        common: Any = {"model": "policy", "instructions": "Be brief.", "tools": tools, **arguments}
        if not stream:
            return await client.responses.create(**common)
        async with client.responses.stream(**common) as events:
            async for _ in events:
                pass
            return await events.get_final_response()

    async def test(stage: Stage) -> None:
        trial = stage.open()
        client = openai.AsyncOpenAI(base_url=f"{trial.url}/v1", api_key="any")
        first = await turn(client, input="What of the sun?")
        call = next(item for item in first.output if item.type == "function_call")
        assert call.name == "look_up"
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "A star."}
        second = await turn(client, input=[result], previous_response_id=first.id)
        assert second.output_text == "It shines, 1."
        assert second.usage.total_tokens > second.usage.output_tokens > 5
        check(stage, trial)
        # The same conversation, sent whole: its turns are known.
        items = [
            {"role": "user", "content": "What of the sun?"},
            *(item.model_dump(exclude_none=True) for item in first.output),
            result,
            *(item.model_dump(exclude_none=True) for item in second.output),
            {"role": "user", "content": "Sure?"},
        ]
        await turn(client, input=items)
        check(stage, trial)

    run(folder, test)


@pytest.mark.parametrize("stream", [False, True])
def test_messages(folder: Path, stream: bool) -> None:
    async def turn(client: anthropic.AsyncAnthropic, messages: list[Any]) -> anthropic.types.Message:
        schema: Any = TOOL["parameters"]
        tool: Any = {"name": TOOL["name"], "description": TOOL["description"], "input_schema": schema}
        common: Any = {
            "model": "policy", "system": "Be brief.", "messages": messages, "tools": [tool], "max_tokens": 900
        }  # fmt: skip
        if not stream:
            return await client.messages.create(**common)
        async with client.messages.stream(**common) as events:
            async for _ in events:
                pass
            return await events.get_final_message()

    async def test(stage: Stage) -> None:
        trial = stage.open(thinking=True)
        stage.engine.says = lambda prompt: f"I wonder.</think>{says(prompt)}"
        client = anthropic.AsyncAnthropic(base_url=stage.url, api_key=trial.access.key)
        source = {"type": "base64", "media_type": "image/png", "data": IMAGE}
        messages: list[Any] = [
            {
                "role": "user",
                "content": [{"type": "image", "source": source}, {"type": "text", "text": "Sun?"}],
            }
        ]
        first = await turn(client, messages)
        assert first.stop_reason == "tool_use"
        assert [block.type for block in first.content] == ["thinking", "text", "tool_use"]
        result = {"type": "tool_result", "tool_use_id": first.content[-1].id, "content": "A star."}
        messages += [
            {"role": "assistant", "content": [each.model_dump(exclude_none=True) for each in first.content]},
            {"role": "user", "content": [result]},
        ]
        second = await turn(client, messages)
        assert second.content[-1].text == "It shines, 1."
        assert second.usage.cache_read_input_tokens > second.usage.input_tokens > 0
        check(stage, trial)

    run(folder, test)
