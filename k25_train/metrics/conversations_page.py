"""The same questions answered before and after a run, as one HTML page next to each other.

Written with the standard library alone; the page needs no other file and no network.
"""

import base64
import html
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources

_SPECIAL = re.compile(r"(&lt;\|[a-z_]+\|&gt;|&lt;/?think&gt;)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A task that was answered once, and what the answer is worth."""

    task: str
    """Key of the task."""
    prompt: str
    """What the user says."""
    images: Sequence[bytes] = field(default=(), repr=False)
    """PNG or JPEG files that belong to it."""
    expected: str
    """What would be right; empty where that is no short text."""
    response: str
    """What was generated, special tokens by name."""
    num_tokens: int
    """Of the response."""
    reward: float
    """Of the verdict; NaN for none."""
    reason: str
    """What the verdict says; empty for nothing."""


def page(
    title: str, facts: Mapping[str, str], before: Sequence[Conversation], after: Sequence[Conversation]
) -> str:
    """The whole page: a row for each task that both have answered, in the order of `before`.

    Args:
        facts: what is said of the run, name -> value.
    """
    style = resources.files(__package__).joinpath("conversations.css").read_text(encoding="utf-8")
    later = {each.task: each for each in after}
    rows = "".join(_row(each, later[each.task]) for each in before if each.task in later)
    said = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in facts.items())
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{style}</style></head><body><h1>{_text(title)}</h1>"
        f"<dl>{said}</dl><table><thead><tr><th>task</th><th>before</th><th>after</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></body></html>\n"
    )


def _row(before: Conversation, after: Conversation) -> str:
    expected = f'<p class="expected">right: {_text(before.expected)}</p>' if before.expected else ""
    asked = "".join(_pictures(before.images)) + f'<p class="prompt">{_text(before.prompt)}</p>{expected}'
    return f"<tr><td>{asked}</td>{_answer(before)}{_answer(after)}</tr>"


def _answer(conversation: Conversation) -> str:
    reward = conversation.reward
    worth = "unscored" if reward != reward else f"reward {reward:.3g}"
    kind = "none" if reward != reward else "good" if reward > 0.5 else "bad"
    reason = f'<span class="reason">{_text(conversation.reason)}</span>' if conversation.reason else ""
    response = _SPECIAL.sub(r'<span class="special">\1</span>', _text(conversation.response))
    return (
        f'<td><p class="response">{response}</p><p class="worth"><span class="{kind}">{worth}</span>'
        f"<span>{conversation.num_tokens} tokens</span>{reason}</p></td>"
    )


def _pictures(images: Sequence[bytes]) -> Iterator[str]:
    for number, image in enumerate(images, start=1):
        kind = "jpeg" if image.startswith(b"\xff\xd8") else "png"
        data = base64.b64encode(image).decode()
        yield f'<img alt="image {number}" src="data:image/{kind};base64,{data}">'


def _text(text: str) -> str:
    return html.escape(text)
