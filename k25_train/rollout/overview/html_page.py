"""A group's conversations as one HTML page: images, tokens with log-probabilities and versions, rewards.

What the policy has drawn is marked the redder, the less probable it was; pointing at a token shows its id,
log-probability and version. The page needs no other file, no script and no network.
"""

import base64
import html
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import resources

from k25_train.rollout.overview.groups import UNDER_WAY, ShownBranch, ShownGroup, ShownResponse

MOST_REPEATED = 3
"""Equal tokens in a row that are shown one by one; images are hundreds of placeholders."""
FLOOR = -6.0
"""Log-probability from which on a token is as red as any. Our choice."""
_IMAGE_TYPES = {b"\xff\xd8": "jpeg", b"GI": "gif", b"RI": "webp"}
Decode = Callable[[Sequence[int]], str]


def page(groups: Sequence[ShownGroup], images: Mapping[int, Sequence[bytes]], decode: Decode) -> str:
    """The whole page.

    Args:
        groups: to show.
        images: number of a group -> images that its responses have seen.
        decode: ids to text.
    """
    style = resources.files(__package__).joinpath("show.css").read_text(encoding="utf-8")
    body = "".join(_group(group, images.get(group.number, ()), decode) for group in groups)
    title = ", ".join(dict.fromkeys(group.task for group in groups))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{style}</style></head><body>{body}</body></html>\n"
    )


def _group(group: ShownGroup, images: Sequence[bytes], decode: Decode) -> str:
    when = "in progress" if group.step == UNDER_WAY else f"trained by step {group.step}"
    shown = "".join(map(_picture, images))
    responses = "".join(_response(number, each, decode) for number, each in enumerate(group.responses))
    facts = f'<p class="facts">group {group.number}, {when}</p>'
    return f"<h1>{html.escape(group.task)}</h1>{facts}{shown}{responses}"


def _response(number: int, response: ShownResponse, decode: Decode) -> str:
    branches = "".join(_branch(index, branch, decode) for index, branch in enumerate(response.branches))
    return f'<h2>response {number}</h2><p class="facts">{_worth(response)}</p>{branches}'


def _worth(response: ShownResponse) -> str:
    facts, reward = response.facts, response.facts["reward"]
    kind = "" if reward is None else "good" if reward > 0.5 else "bad"
    words = [f'<b class="{kind}">{"no reward yet" if reward is None else f"reward {reward:.3g}"}</b>']
    words += [f"{html.escape(name)} {value:.3g}" for name, value in facts["parts"].items()]
    words.append(f"{response.num_drawn} tokens")
    if facts["finish_reason"]:
        words.append(f"ended by {html.escape(str(facts['finish_reason']))}")
    words += [f"{facts[name]} {name}" for name in ("turns",) if facts.get(name, 1) > 1]
    if facts.get("attempt", 0):
        words.append(f"attempt {facts['attempt']}")
    if len(response.versions):
        words.append(f"weights of steps {response.versions.min()} to {response.versions.max()}")
    if facts["reason"]:
        words.append(html.escape(facts["reason"]))
    return ", ".join(words)


def _branch(index: int, branch: ShownBranch, decode: Decode) -> str:
    start = branch.num_shared if index else 0
    head = f"<h3>branch {index}, behind {branch.num_shared} tokens that are shared</h3>" if index else ""
    parts = []
    positions = range(start, len(branch.token_ids))
    for is_drawn, run in itertools.groupby(positions, key=lambda each: bool(branch.generated[each])):
        kind, text = ("drawn", _drawn) if is_drawn else ("seen", _seen)
        parts.append(f'<div class="text {kind}">{"".join(text(branch, list(run), decode))}</div>')
    return head + "".join(parts)


def _seen(branch: ShownBranch, positions: Sequence[int], decode: Decode) -> Iterator[str]:
    ids = [int(branch.token_ids[each]) for each in positions]
    plain: list[int] = []
    for token, equal in itertools.groupby(ids):
        number = len(list(equal))
        if number <= MOST_REPEATED:
            plain += [token] * number
            continue
        yield html.escape(decode(plain))
        plain = []
        yield f"{html.escape(decode([token]))} × {number}"
    yield html.escape(decode(plain))


def _drawn(branch: ShownBranch, positions: Sequence[int], decode: Decode) -> Iterator[str]:
    version = None
    for each in positions:
        if (now := int(branch.versions[each])) != version:
            version = now
            yield f'<span class="version">step {version}</span>'
        token, logprob = int(branch.token_ids[each]), float(branch.logprobs[each])
        mark = min(max(logprob / FLOOR, 0.0), 1.0) * 0.6
        title = f"id {token}, log-probability {logprob:.3f} ({math.exp(logprob):.1%}), step {version}"
        yield f'<i style="--p:{mark:.2f}" title="{title}">{html.escape(decode([token]))}</i>'


def _picture(image: bytes) -> str:
    kind = _IMAGE_TYPES.get(image[:2], "png")
    return f'<figure><img alt="" src="data:image/{kind};base64,{base64.b64encode(image).decode()}"></figure>'
