"""The command of an agent: how it is told what to do, and where the policy is."""

import configparser
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from k25_train.environments.environment import Observation
from k25_train.environments.sandboxes.base import WORK
from k25_train.rollout.gateway.registry import Access

MODEL = "policy"
"""Name of the model; requests may name any other."""
PROMPT_FILE = "/task/prompt.txt"
"""What is asked, for agents that read files; images are next to it."""


def prompt_of(opening: Observation) -> str:
    """The text of what is asked: all messages of the user."""
    texts = []
    for message in opening.messages:
        content = message.get("content")
        if message.get("role") != "user":
            continue
        parts = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
        texts += [part["text"] for part in parts if part.get("type") == "text"]
    return "\n".join(texts)


def files_of(opening: Observation) -> dict[str, bytes]:
    """What the agent finds in its sandbox, read-only."""
    images = {f"/task/image_{number}.png": image for number, image in enumerate(opening.media)}
    return {PROMPT_FILE: prompt_of(opening).encode(), **images}


def filled(command: Sequence[str], opening: Observation) -> list[str]:
    """The command with `{prompt}`, `{prompt_file}` and `{model}` in its words replaced."""
    values = {"{prompt_file}": PROMPT_FILE, "{model}": MODEL, "{prompt}": prompt_of(opening)}
    found = []
    for word in command:
        # The prompt last: what it holds in braces stays.
        for name, value in values.items():
            word = word.replace(name, value)
        found.append(word)
    return found


def variables_of(url: str, access: Access) -> dict[str, str]:
    """What SDKs and agents find the policy by. `url`: of the gateway, as the sandbox reaches it."""
    base = f"{url}/sessions/{access.session_id}"
    return {
        "OPENAI_BASE_URL": f"{base}/v1",
        "OPENAI_API_BASE": f"{base}/v1",
        "OPENAI_API_KEY": access.key,
        "ANTHROPIC_BASE_URL": base,
        "ANTHROPIC_API_KEY": access.key,
        "HOME": WORK,
    }


def folders_of(command: Sequence[str]) -> Mapping[str, Path]:
    """Folders that a command of this machine needs in a sandbox, read-only.

    Of each word that is the path of a program: its virtual environment, and the Python that this was made
    from, or its folder; nothing of programs that are found by their names.
    """
    found: dict[str, Path] = {}
    for word in command:
        program = Path(word)
        if "\n" not in word and program.is_absolute() and program.is_file():
            found |= {str(each): each for each in _needed(program) if not each.is_relative_to("/usr")}
    return found


def _needed(program: Path) -> tuple[Path, ...]:
    for folder in program.parents:
        settings = folder / "pyvenv.cfg"
        if settings.exists():
            parser = configparser.ConfigParser()
            parser.read_string("[all]\n" + settings.read_text(encoding="utf-8"))
            return folder, Path(parser["all"].get("home", sys.base_prefix)).parent
    return (program.parent,)
