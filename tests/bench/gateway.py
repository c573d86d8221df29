"""The gateway: requests per second, what it adds to an engine's time, a long queue, and every token as drawn.

    python -m tests.bench.gateway [--sessions 1000]

The gateway and its engine, which says what it is told to, are a process of their own; the client is another.
Then sessions with calls of tools, a history that is rewritten, a retry, streams and images: what is trained
has to be what the engine saw and drew, each turn once.
"""

import argparse
import asyncio
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import aiohttp

from k25_train.rollout.engines.image_types import data_uri
from tests.helpers.gateway_parts import END, Stage, Trial, call_text, gateway_stage
from tests.helpers.sampled_engine import picture

REQUESTS_PER_S, ADDED_MS, QUEUED = 500, 5.0, 2_000
"""Bars."""
IN_FLIGHT, ENGINE_S, NUM_REQUESTS, NUM_SESSIONS = 64, 0.25, 4_000, 64
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}


def answer(prompt: str) -> str:
    """Twenty letters."""
    return f"It shines in the sky{END}"


def turns(prompt: str) -> str:
    """A call, or an answer that depends on all before."""
    if prompt.count("Return of") < 2:
        return call_text("look_up", '{"word":  "sun",  "number": ' + str(len(prompt)) + "}", said=" Well, ")
    return f"  It shines, {len(prompt)}. {END}"


def serve(pipe: Connection, folder: str, pause_s: float) -> None:
    """A gateway in this process, until the pipe says something."""

    async def main() -> None:
        async with gateway_stage(Path(folder), answer, pause_s) as stage:
            keys = [stage.open(f"task {n}", max_turns=10**6).access.key for n in range(NUM_SESSIONS)]
            pipe.send((stage.url, keys))
            await asyncio.to_thread(pipe.recv)

    import uvloop

    uvloop.run(main())


async def ask(http: aiohttp.ClientSession, url: str, key: str, number: int) -> float:
    """Seconds of one request. Raises for any other status than 200."""
    messages = [
        {"role": "system", "content": "Be brief and say what there is to say."},
        {"role": "user", "content": f"What of the sun, and of number {number}?"},
    ]
    began = time.perf_counter()
    headers = {"authorization": f"Bearer {key}", "x-stainless-retry-count": "0"}
    body = {"model": "policy", "messages": messages}
    async with http.post(f"{url}/v1/chat/completions", json=body, headers=headers) as response:
        response.raise_for_status()
        await response.json()
    return time.perf_counter() - began


async def load(url: str, keys: list[str], number: int, in_flight: int) -> tuple[list[float], float]:
    """Seconds of each of so many requests, and of all together."""
    waiting = iter(range(number))
    found: list[float] = []

    async def client() -> None:
        for each in waiting:
            seconds = await ask(http, url, keys[each % len(keys)], each)
            found.append(seconds)

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as http:
        began = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(in_flight)))
        return found, time.perf_counter() - began


def served(folder: str, pause_s: float, number: int, in_flight: int) -> tuple[list[float], float]:
    """The load on a gateway in another process whose engine takes so long."""
    context = multiprocessing.get_context("spawn")
    own, other = context.Pipe()
    process = context.Process(target=serve, args=(other, folder, pause_s))
    process.start()
    try:
        url, keys = own.recv()
        asyncio.run(load(url, keys, min(number, 300), in_flight))
        return asyncio.run(load(url, keys, number, in_flight))
    finally:
        own.send("end")
        process.join(20)


async def say(http: aiohttp.ClientSession, url: str, messages: list[Any], stream: bool) -> dict[str, Any]:
    """The assistant's message, by whichever way."""
    body = {"model": "policy", "messages": messages, "tools": [TOOL], "stream": stream}
    async with http.post(url, json=body) as response:
        response.raise_for_status()
        if not stream:
            message: dict[str, Any] = (await response.json())["choices"][0]["message"]
            return message
        text = await response.text()
    told: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": []}
    for line in text.splitlines():
        if not line.startswith("data: {"):
            continue
        for choice in json.loads(line.removeprefix("data: "))["choices"]:
            told["content"] += choice["delta"].get("content") or ""
            for call in choice["delta"].get("tool_calls", ()):
                if "id" in call:
                    told["tool_calls"].append(call)
                else:
                    told["tool_calls"][-1]["function"]["arguments"] += call["function"]["arguments"]
    return told


async def converse(http: aiohttp.ClientSession, trial: Trial, number: int) -> None:
    """A session: an image, two calls, a stream, a retry, and a result that is rewritten."""
    url = f"{trial.url}/v1/chat/completions"
    image = {"type": "image_url", "image_url": {"url": data_uri(picture(28 + 28 * (number % 3), 28, number))}}
    messages: list[Any] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": f"Sun {number}?"}, image]},
    ]
    for turn in range(2):
        message = await say(http, url, messages, stream=turn == 1)
        # As clients give it back: arguments in another form.
        call = message["tool_calls"][0]
        call["function"]["arguments"] = json.dumps(json.loads(call["function"]["arguments"]))
        result = {"role": "tool", "tool_call_id": call["id"], "content": f"A star, {turn}."}
        messages += [message, result]
    await say(http, url, messages, stream=False)
    # The same once more is a retry; with another result it is a fork.
    await say(http, url, messages, stream=False)
    await say(http, url, [*messages[:-1], {**messages[-1], "content": "A lamp."}], stream=bool(number % 2))


async def identity(folder: Path, num_sessions: int) -> tuple[int, int, list[str]]:
    """Turns and branches that were made, and where what is trained is not what was drawn."""
    async with gateway_stage(folder, turns) as stage, aiohttp.ClientSession() as http:
        trials = [stage.open(f"task {number}") for number in range(num_sessions)]
        waiting = iter(enumerate(trials))

        async def client() -> None:
            for number, trial in waiting:
                await converse(http, trial, number)

        await asyncio.gather(*(client() for _ in range(IN_FLIGHT)))
        return len(stage.engine.exchanges), *_told(stage, trials)


def _told(stage: Stage, trials: list[Trial]) -> tuple[int, list[str]]:
    wrong = stage.mismatches(trials)
    for trial in trials:
        if trial.session.repeats.num_repeated != 1 or len(trial.response.branches) != 2:
            wrong.append(f"{trial.access}: a retry was not answered once, or a rewrite did not fork")
    return sum(len(trial.response.branches) for trial in trials), wrong


def main() -> int:
    """Measure; 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, default=1000)
    num_sessions = parser.parse_args().sessions
    with tempfile.TemporaryDirectory() as name:
        # 1. As fast as it goes, then at an engine's pace, then far too many at once.
        _, seconds = served(name, 0.0, NUM_REQUESTS, IN_FLIGHT)
        rate = NUM_REQUESTS / seconds
        paced, _ = served(name, ENGINE_S, NUM_REQUESTS // 4, IN_FLIGHT)
        added = 1000 * (statistics.median(paced) - ENGINE_S)
        queued, _ = served(name, 0.05, QUEUED, QUEUED)

        # 2. What is trained.
        num_turns, num_branches, wrong = asyncio.run(identity(Path(name), num_sessions))
    for text in wrong[:10]:
        print(text)
    print(f"queued at once: {len(queued):,} of {QUEUED:,} answered")
    print(
        f"{num_sessions:,} sessions, {num_turns:,} turns, {num_branches:,} branches: {len(wrong)} mismatches"
    )
    print(f"{rate:.0f} requests/s (bar: {REQUESTS_PER_S}), added p50 {added:.1f} ms (bar: {ADDED_MS:g})")
    is_met = rate >= REQUESTS_PER_S and added <= ADDED_MS and len(queued) == QUEUED and not wrong
    return 0 if is_met else 1


if __name__ == "__main__":
    sys.exit(main())
