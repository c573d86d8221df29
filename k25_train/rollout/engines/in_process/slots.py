"""Slots: responses that are generated together, one token each in every forward.

Those in use are always the first ones, so that a forward is over rows 0 to b-1 of the cache:

    waiting ─► prefill, equal prompts once ─► slots 0 … b-1 ─► one token each ─► one ends: the last moves up
       ▲                                        │
       └──── all of them after a commit ◄───────┘   what older weights have made of their tokens is not used
"""

from collections import OrderedDict, deque
from collections.abc import Sequence

import torch
from torch import Tensor

from k25_train.rollout.engines.base import EngineError, FinishReason
from k25_train.rollout.engines.in_process.network import Network
from k25_train.rollout.engines.in_process.responses import Response
from k25_train.rollout.engines.in_process.responses import Sequence as Expanded
from k25_train.rollout.engines.in_process.sampling import draw, uniforms

PREFILL_TOKENS = 4096
"""Most tokens of a forward of prompts, padding included; a longer prompt is alone in its forward."""
KEPT_IMAGES = 64
"""Images whose features are kept for the other responses of the same prompt."""


class Slots:
    """All responses of an engine. Used by its thread alone."""

    def __init__(self, network: Network, max_running: int, name: str) -> None:
        self._network = network
        self._max_running = max_running
        self._name = name
        self._cache = network.new_cache(max_running)
        self._features: OrderedDict[bytes, Tensor] = OrderedDict()
        self._forbidden: dict[tuple[int, ...], Tensor] = {}
        self.version = -1
        """Of the weights; -1 before the first."""
        self.running: list[Response] = []
        """By slot."""
        self.waiting: deque[Response] = deque()
        """In the order of their turn."""

    @property
    def has_work(self) -> bool:
        """Whether there is a token to be made."""
        return bool(self.running or self.waiting)

    @property
    def use(self) -> float:
        """Share of the slots in use, each of which has room for the keys and values of a response."""
        return len(self.running) / self._max_running

    def step(self) -> None:
        """One more token for every response that has a slot; free slots are filled first."""
        self._drop_cancelled()
        while self.waiting and len(self.running) < self._max_running:
            self._prefill(self._next_prompts())
        if self.running:
            self._decode()

    def abort(self) -> None:
        """End all with what they have."""
        for response in (*self.running, *self.waiting):
            response.finish(FinishReason.aborted)
        self.running.clear()
        self.waiting.clear()

    def fail(self, error: EngineError) -> None:
        """End all with an error."""
        for response in (*self.running, *self.waiting):
            response.fail(error)
        self.running.clear()
        self.waiting.clear()

    def weights_changed(self, version: int) -> None:
        """Nothing that older weights have made is used again: who has a slot starts over from its tokens."""
        self.version = version
        self._features.clear()
        self.waiting.extendleft(reversed(self.running))
        self.running.clear()

    def embed(self, sequence: Expanded, ids: Sequence[int]) -> Tensor:
        """[n, C] of ids that begin with the sequence's."""
        features = [
            self._image_features(data, number, sequence) for number, data in enumerate(sequence.encoded)
        ]
        return self._network.embed(ids, features)

    def _drop_cancelled(self) -> None:
        for slot in range(len(self.running) - 1, -1, -1):
            if self.running[slot].future.cancelled():
                self._free(slot)
        if any(response.future.cancelled() for response in self.waiting):
            self.waiting = deque(each for each in self.waiting if not each.future.cancelled())

    def _next_prompts(self) -> dict[tuple[object, ...], list[Response]]:
        """Those whose turn it is, as many as fit in the slots and in one forward; equal ones together."""
        free = self._max_running - len(self.running)
        chosen: dict[tuple[object, ...], list[Response]] = {}
        longest = 0
        while self.waiting and free:
            following = self.waiting[0]
            longest = max(longest, len(following.ids))
            key = (tuple(following.ids), following.request.images)
            if chosen and key not in chosen and longest * (len(chosen) + 1) > PREFILL_TOKENS:
                break
            chosen.setdefault(key, []).append(self.waiting.popleft())
            free -= 1
        return chosen

    def _prefill(self, groups: dict[tuple[object, ...], list[Response]]) -> None:
        """Fill slots; the responses of a group begin with the same tokens, of which keys are made once."""
        first = len(self.running)
        leaders = [group[0] for group in groups.values()]
        self.running += leaders
        prompts = [self.embed(response.prompt, response.ids) for response in leaders]
        rows = slice(first, first + len(leaders))
        hidden = [each[-1] for each in self._network.prompts(prompts, self._cache, rows)]
        for place, group in enumerate(groups.values()):
            for response in group[1:]:
                self._cache.copy(first + place, len(self.running))
                self.running.append(response)
                hidden.append(hidden[place])
        self._add_tokens(first, torch.stack(hidden))

    def _decode(self) -> None:
        ids = [response.ids[-1] for response in self.running]
        positions = [len(response.ids) - 1 for response in self.running]
        self._add_tokens(0, self._network.tokens(ids, positions, self._cache))

    def _add_tokens(self, first: int, hidden: Tensor) -> None:
        """Draw a token for each slot from `first` on, out of hidden states [b, C]; end who has its last."""
        responses = self.running[first:]
        logits = self._network.logits(hidden)
        numbers = uniforms([each.sampling.seed for each in responses], [each.position for each in responses])
        drawn = draw(
            logits,
            torch.tensor([each.sampling.temperature for each in responses], device=logits.device),
            self._forbidden_of(responses, logits.device),
            torch.from_numpy(numbers).to(logits.device),
        )
        tokens = zip(responses, drawn.ids.tolist(), drawn.logprobs.tolist(), strict=True)
        sound = drawn.logprobs.isfinite().tolist()
        ended = []
        for slot, (response, token, logprob) in enumerate(tokens, start=first):
            if not sound[slot - first]:
                response.fail(self._not_finite(response))
                ended.append(slot)
                continue
            response.add(token, logprob, self.version)
            if (reason := response.end) is not None:
                response.finish(reason)
                ended.append(slot)
        for slot in reversed(ended):
            self._free(slot)

    def _not_finite(self, response: Response) -> EngineError:
        return EngineError(
            f"{self._name}: {response.request.key}: token {response.position} has a log-probability that "
            f"is not finite, with the weights of version {self.version}"
        )

    def _free(self, slot: int) -> None:
        """Give up a slot; the last one moves there, so that those in use are the first."""
        last = self.running.pop()
        if slot < len(self.running):
            self.running[slot] = last
            self._cache.copy(len(self.running), slot)

    def _forbidden_of(self, responses: list[Response], device: torch.device) -> Tensor:
        """[b, V] or [1, V] bool."""
        kinds = {response.sampling.forbidden_ids for response in responses}
        for ids in kinds - self._forbidden.keys():
            mask = torch.zeros(self._network.vocab_size, dtype=torch.bool, device=device)
            mask[list(ids)] = True
            self._forbidden[ids] = mask
        rows = kinds if len(kinds) == 1 else [response.sampling.forbidden_ids for response in responses]
        return torch.stack([self._forbidden[ids] for ids in rows])

    def _image_features(self, data: bytes, number: int, sequence: Expanded) -> Tensor:
        if data not in self._features:
            self._features[data] = self._network.image_features(sequence.images[number])
            while len(self._features) > KEPT_IMAGES:
                self._features.popitem(last=False)
        return self._features[data]
