"""A task under another system prompt, names of tools, format of its answer, and language of these.

What is asked, and how it is judged, stays. What a task becomes depends on its key alone, so it is the same
whenever it is made.
"""

import random
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from k25_train.environments.base import Task
from k25_train.environments.diversify.texts import ANSWERED, BOXED, LAST_LINE, SYSTEMS, TOOLS

ENGLISH_SHARE = 0.6
"""Of tasks; the others' languages are drawn alike. Our choice."""
SYSTEM_SHARE = 0.75
"""Of tasks that get a system prompt. Our choice."""
FORMAT_SHARE = 0.5
"""Of tasks that say how a final answer is to be written. Our choice."""
RENAMED_SHARE = 0.6
"""Of tools that have another name than their own. Our choice."""


def diversified(task: Task) -> Task:
    """The task, varied."""
    rng = random.Random(f"diversify {task.key}")
    languages = list(SYSTEMS)
    language = "en" if rng.random() < ENGLISH_SHARE else rng.choice(languages[1:])
    messages = list(task.messages)
    # Drawn in any case, so that a share that is changed moves nothing else.
    system, has_system = rng.choice(SYSTEMS[language]), rng.random() < SYSTEM_SHARE
    form, has_form = rng.choice([BOXED, LAST_LINE])[language], rng.random() < FORMAT_SHARE
    if has_form and task.judge in ANSWERED:
        messages[-1] = with_sentence(messages[-1], form)
    if has_system and messages[0].get("role") != "system":
        messages.insert(0, {"role": "system", "content": system})
    return replace(task, messages=tuple(messages), setup=_setup(rng, task))


def with_sentence(message: Mapping[str, Any], sentence: str) -> Mapping[str, Any]:
    """A message with a paragraph behind what it says."""
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": f"{content}\n\n{sentence}"}
    return {**message, "content": [*content, {"type": "text", "text": f"\n\n{sentence}"}]}


def _setup(rng: random.Random, task: Task) -> Mapping[str, Any]:
    """The setup with toolsets in another order and tools under other names; those that the prompt speaks of
    keep theirs."""
    if task.environment != "tools":
        return task.setup
    toolsets = list(task.setup["toolsets"].items())
    rng.shuffle(toolsets)
    said = str(task.messages)
    names: dict[str, Any] = {}
    for tool, others in TOOLS.items():
        chosen, is_renamed = rng.choice(others), rng.random() < RENAMED_SHARE
        if is_renamed and not re.search(rf"\b{tool}\b", said):
            names[tool] = chosen
    return {**task.setup, "toolsets": dict(toolsets), "tools": {**names, **task.setup.get("tools", {})}}
