"""Conversations of one session as a tree of messages, and where in the response each of them is.

    tools ─► system ─► user ─► answer 0 ─► result ─► answer 1 ─► user      one branch grows
                         │         └─────► result'                         a result that differs: a fork
                         └──► answer 0'                                    drawn again: a fork in front of it
    tools ─► system' ─► …                                                  another prompt: a branch of its own

A message is found by its digest below the one before. All that is encoded
is what follows the last answer that was drawn here and came back as it was; in front of it are ids on record.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from k25_train.rollout.gateway.conversation import Message
from k25_train.rollout.turns import ROOT, Place


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """An answer that was drawn here."""

    place: Place
    """Behind its last token."""
    last_id: int
    """That token."""
    call_ids: tuple[str, ...]
    """Ids of its calls, as the client knows them."""
    policy_ids: tuple[str, ...]
    """The same, as the policy wrote them."""


@dataclass(slots=True)
class Node:
    """A message behind all those before it."""

    drawn: Drawn | None = None
    """None for what the client wrote."""
    children: dict[str, list["Node"]] = field(default_factory=dict)
    """Digest -> messages that say it, the latest last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Where a conversation goes on."""

    num_known: int
    """Messages up to the latest answer on record; what is behind them is new."""
    drawn: Drawn | None
    """That answer; None where none of this history was drawn here."""
    path: tuple[Drawn, ...]
    """All answers on record up to it, in order."""
    is_fork: bool
    """Whether something else follows there already, or words come back as the assistant's that are not."""

    @property
    def after(self) -> Place:
        """Where the next turn is put."""
        return ROOT if self.drawn is None else self.drawn.place


class Tree:
    """The conversations of one session."""

    def __init__(self) -> None:
        self._roots: dict[str, Node] = {}
        self.num_drawn = 0
        """Answers on record."""

    def find(self, root: str, messages: Sequence[Message]) -> Found:
        """Where a conversation goes on. `root`: digest of what comes before all messages, such as tools."""
        node = self._roots.get(root)
        path: list[Drawn] = []
        last, num_known = node, 0
        for number, message in enumerate(messages):
            node = None if node is None else _child(node, message)
            if node is None:
                break
            if node.drawn is not None:
                path.append(node.drawn)
                last, num_known = node, number + 1
        is_new = not path and not self.num_drawn
        has_more = not path or (last is not None and bool(last.children))
        is_foreign = any(message.role == "assistant" for message in messages[num_known:])
        return Found(
            num_known=num_known,
            drawn=path[-1] if path else None,
            path=tuple(path),
            is_fork=not is_new and (has_more or is_foreign),
        )

    def add(self, root: str, messages: Sequence[Message], answer: Message, drawn: Drawn) -> None:
        """Put an answer behind a conversation."""
        node = self._roots.setdefault(root, Node())
        for message in messages:
            known = _child(node, message)
            if known is None:
                known = Node()
                node.children.setdefault(message.digest, []).append(known)
            node = known
        node.children.setdefault(answer.digest, []).append(Node(drawn))
        self.num_drawn += 1


def _child(node: Node, message: Message) -> Node | None:
    """Of the messages that say this, the one whose calls have the same ids, else the latest."""
    found = node.children.get(message.digest)
    if not found:
        return None
    ids = tuple(call.id for call in message.calls)
    same = [each for each in found if ids and each.drawn is not None and each.drawn.call_ids == ids]
    return (same or found)[-1]
