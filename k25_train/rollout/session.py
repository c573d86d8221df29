"""One response in the making: token ids in, token ids out, and every segment in the records.

    branch  [prompt ████ drawn ░░ observed ████ drawn … ]      Request: it all, one placeholder an image
                              ▲                                Generated: the next tokens, checked, recorded
                              └ by `turn`

What an engine drew is sent to it again as it was: nothing is encoded twice. Draws of a turn depend on the
response's seed, the number of the turn and the position in it, whatever interrupts it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from k25_train.data.mix.permutation import key_of
from k25_train.rollout.asking import Asking
from k25_train.rollout.branches import Branch, Segment
from k25_train.rollout.engines.base import FinishReason, Generated, Request, Sampling
from k25_train.rollout.manager.scope import count
from k25_train.rollout.records import Record
from k25_train.rollout.response_records import digest_of, extended, medium
from k25_train.rollout.trajectory import Response
from k25_train.rollout.turns import ROOT, NoRoomError, Observed, Place, Turn
from k25_train.rollout.vocabulary import Vocabulary
from k25_train.rollout.work import Round

SEED_BITS = 63
"""Of the seed of a turn: what every engine takes as an integer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What a response is called, and what its draws depend on."""

    task: str
    """Key of its task."""
    group: int
    """Number of its group."""
    sample: int
    """Its place in the group."""
    seed: int
    """Of its draws."""


class _Prompt(NamedTuple):
    """What a turn is drawn behind."""

    shown: tuple[int, ...]
    """Ids with one placeholder for each image."""
    images: tuple[bytes, ...]
    expanded: np.ndarray
    """[P] int32: the ids with every placeholder."""
    num_recorded: int
    """Images that the branch has already."""
    number: int
    """Of the turn."""


class Session:
    """See `Turns`. For one event loop; branches may be gone on with at once, each by one call at a time."""

    def __init__(
        self,
        identity: Identity,
        response: Response,
        media: dict[str, bytes],
        *,
        asking: Asking,
        vocabulary: Vocabulary,
        allowed: Round,
        append: Callable[[Record], None],
    ) -> None:
        """
        Args:
            identity: of the response.
            response: what there is of it; `append` extends it.
            media: digest -> image of its group, which `append` extends as well.
            asking: asks engines.
            vocabulary: ids with a meaning.
            allowed: how far the response may get now.
            append: takes every record in.
        """
        self.identity = identity
        self.response = response
        self._media = media
        self._asking = asking
        self._vocabulary = vocabulary
        self._allowed = allowed
        self._append = append
        self._num_turns = response.num_turns

    def collapsed(self, token_ids: np.ndarray) -> tuple[int, ...]:
        """Ids with one placeholder for each image."""
        return self._vocabulary.collapsed(token_ids)

    async def turn(self, observed: Observed, after: Place, *, max_tokens: int | None = None) -> Turn:
        """See `Turns`."""
        before, images = self._before(after)
        shown = (*self._vocabulary.collapsed(before), *observed.token_ids)
        images += observed.media
        expanded = self._vocabulary.expanded(shown, images)
        opening = self._check_opening(expanded, after)
        room = self._asking.config.max_tokens - (len(expanded) - opening)
        if room <= 0 or (max_tokens is not None and max_tokens <= 0):
            return self._nothing(after)
        for image in observed.media:
            if digest_of(image) not in self._media:
                self._append(medium(self.identity.group, image))
        most = room if max_tokens is None else min(room, max_tokens)
        number, self._num_turns = self._num_turns, self._num_turns + 1
        prompt = _Prompt(shown, images, expanded, self._vocabulary.num_media(before), number)
        return await self._draw(prompt, after, expanded[len(before) :], [], most)

    async def go_on(self, *, max_tokens: int | None = None) -> Turn:
        """Go on with the turn that was interrupted (`Response.open_branch`)."""
        branch = self.response.branches[self.response.open_branch]
        began = _turn_begins(branch)
        before = branch.token_ids[:began]
        images = self._images(branch)
        shown = self._vocabulary.collapsed(before)
        room = self._asking.config.max_tokens - (began - branch.prompt_tokens)
        most = room if max_tokens is None else min(room, max_tokens)
        place = Place(self.response.open_branch, len(branch.token_ids))
        prompt = _Prompt(shown, images, before, len(images), self.response.num_turns - 1)
        return await self._draw(prompt, place, before[:0], [branch.token_ids[began:]], most)

    async def _draw(
        self, prompt: _Prompt, after: Place, observed: np.ndarray, has: list[np.ndarray], most: int
    ) -> Turn:
        """Ask until the turn has ended, or has what the round allows.

        Args:
            prompt: of the turn.
            after: where the first segment is put.
            observed: [m] int32, what of the prompt is not recorded yet.
            has: what the turn has drawn already.
            most: tokens of the turn.
        """
        while True:
            had = sum(map(len, has))
            room = min(most - had, self._round_room())
            if room <= 0:
                reason = FinishReason.aborted if most > had else FinishReason.length
                return self._turn(after, has, reason)
            generated = await self._asking.ask(self._request(prompt, has, had + room), prompt.expanded)
            reason = generated.finish_reason
            if reason is FinishReason.length and had + len(generated.token_ids) < most:
                # Of the round, not of the turn.
                reason = FinishReason.aborted
            after = self._record(prompt, after, observed, generated, reason)
            observed = observed[:0]
            has.append(np.asarray(generated.token_ids, np.int32))
            if reason is not FinishReason.aborted:
                return self._turn(after, has, reason)

    def _record(
        self,
        prompt: _Prompt,
        after: Place,
        observed: np.ndarray,
        generated: Generated,
        reason: FinishReason,
    ) -> Place:
        """Record a segment; where the branch ends with it."""
        shared = prompt.num_recorded
        new = tuple(digest_of(image) for image in prompt.images[shared:]) if len(observed) else ()
        is_fork = after != ROOT and after.num_tokens < len(self.response.branches[after.branch].token_ids)
        number = len(self.response.branches) if after == ROOT or is_fork else after.branch
        segment = Segment(
            round=self._allowed.number,
            after=after,
            observed_ids=np.asarray(observed, np.int32),
            media=new,
            token_ids=np.asarray(generated.token_ids, np.int32),
            logprobs=np.asarray(generated.logprobs, np.float32),
            spans=generated.spans,
            finish_reason=reason,
        )
        name = self.identity
        self._append(extended(name.group, name.sample, self.response, segment, shared if is_fork else 0))
        count("turns", len(observed) > 0)
        count("tokens", len(segment.token_ids))
        return Place(number, len(self.response.branches[number].token_ids))

    def _request(self, prompt: _Prompt, has: Sequence[np.ndarray], most: int) -> Request:
        name, vocabulary, number = self.identity, self._vocabulary, prompt.number
        # The first turn's is the response's own, as when there was one turn alone.
        seed = key_of(name.seed, "turn", number) >> (64 - SEED_BITS) if number else name.seed
        return Request(
            key=f"{name.task}#{name.seed:x}" + (f", turn {number}" if number else ""),
            prompt_ids=prompt.shown,
            images=prompt.images,
            response_ids=tuple(token for each in has for token in each.tolist()),
            sampling=Sampling(
                max_tokens=most,
                temperature=self._asking.config.temperature,
                seed=seed,
                stop_ids=vocabulary.stop_ids,
                forbidden_ids=vocabulary.forbidden_ids,
            ),
        )

    def _before(self, after: Place) -> tuple[np.ndarray, tuple[bytes, ...]]:
        """What a place has in front of it: [n] int32 ids with every placeholder, and their images."""
        if after == ROOT:
            return np.zeros(0, np.int32), ()
        branch = self.response.branches[after.branch]
        ids = branch.token_ids[: after.num_tokens]
        return ids, self._images(branch)[: self._vocabulary.num_media(ids)]

    def _images(self, branch: Branch) -> tuple[bytes, ...]:
        return tuple(self._media[digest] for digest in branch.media)

    def _check_opening(self, expanded: np.ndarray, after: Place) -> int:
        """Tokens of the prompt that the branch begins with. Raises `NoRoomError` for too long a one."""
        if after != ROOT:
            return self.response.branches[after.branch].prompt_tokens
        most = self._asking.config.max_prompt_tokens
        if len(expanded) > most:
            raise NoRoomError(
                f"task {self.identity.task}: its prompt has {len(expanded)} tokens with its images, "
                f"rollout.max_prompt_tokens={most}: raise it, and train.seq_len with it, or leave the task "
                "out"
            )
        return len(expanded)

    def _round_room(self) -> int:
        cap = self._allowed.cap
        if cap is None:
            return np.iinfo(np.int64).max
        had = self.response.round_tokens if self.response.last_round == self._allowed.number else 0
        return cap - had

    def _turn(self, place: Place, has: Sequence[np.ndarray], reason: FinishReason) -> Turn:
        tokens = np.concatenate([np.zeros(0, np.int32), *has])
        branch = self.response.branches[place.branch] if place.branch >= 0 else Branch()
        logprobs = branch.logprobs[len(branch.logprobs) - len(tokens) :]
        return Turn(place=place, token_ids=tokens, logprobs=logprobs, finish_reason=reason)

    def _nothing(self, place: Place) -> Turn:
        """No room is left, so the turn has no tokens."""
        return self._turn(place, (), FinishReason.length)


def _turn_begins(branch: Branch) -> int:
    """Tokens of a branch in front of the last run of drawn ones."""
    observed = np.flatnonzero(~branch.drawn)
    return int(observed[-1]) + 1 if len(observed) else 0
