"""Keys and values of every slot, each as long as its own response: transformers' cache interface.

    slot 0  ■ ■ ■ ■ ■ ■ ·  ·        a forward of a whole prompt writes ■ from 0 on, for new slots;
    slot 1  ■ ■ ·  ·  ·  ·  ·  ·        one of a token writes at each slot's own length.
    slot 2  ■ ■ ■ ■ ·  ·  ·  ·        Behind its length a slot has what others left: masks keep it out.

What is kept are MLA's latents, as transformers' attention hands them over: kv_lora_rank numbers a token, and
the key's rotated part.
"""

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

_FIRST_LENGTH = 64


class SlotCache(Cache):
    """Latents of all layers and slots. `begin_prompts` or `begin_tokens` says what the next forward is."""

    def __init__(
        self,
        num_layers: int,
        num_slots: int,
        widths: tuple[int, int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """`widths`: numbers a token has in the latent, and in the rotated part of its key."""
        # The base class needs layers, which nothing asks: masks and positions are given.
        super().__init__(layers=[DynamicLayer() for _ in range(num_layers)])
        self._parts = [
            torch.zeros(num_layers, num_slots, 1, _FIRST_LENGTH, width, device=device, dtype=dtype)
            for width in widths
        ]
        self._rows = slice(0, 0)
        self._places: tuple[Tensor, Tensor] | None = None
        self._num_keys = 0

    @property
    def length(self) -> int:
        """Tokens that a slot has room for."""
        return self._parts[0].shape[3]

    def begin_prompts(self, rows: slice, num_tokens: int) -> None:
        """The next forward is of whole prompts, padded to `num_tokens` on the right, in these slots."""
        self._grow(num_tokens)
        self._rows, self._places, self._num_keys = rows, None, num_tokens

    def begin_tokens(self, lengths: Tensor, num_keys: int) -> None:
        """The next forward is of one token in each of the first slots, at `lengths` [b]; each sees the first
        `num_keys` of its slot."""
        self._grow(num_keys)
        rows = torch.arange(len(lengths), device=lengths.device)
        self._rows, self._places, self._num_keys = slice(0, len(lengths)), (rows, lengths), num_keys

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Keep what a layer has made of the tokens, [b, 1, n, width] each; returns what these see."""
        parts = [part[layer_idx, self._rows] for part in self._parts]
        for part, new in zip(parts, (key_states, value_states), strict=True):
            if self._places is None:
                part[:, :, : self._num_keys] = new
            else:
                rows, places = self._places
                part[rows, 0, places] = new[:, 0, 0]
        return parts[0][:, :, : self._num_keys], parts[1][:, :, : self._num_keys]

    def copy(self, source: int, target: int) -> None:
        """Give a slot what another has."""
        for part in self._parts:
            part[:, target] = part[:, source]

    def _grow(self, num_keys: int) -> None:
        """Twice as long, until it has room."""
        length = self.length
        while length < num_keys:
            length *= 2
        if length > self.length:
            self._parts = [
                torch.nn.functional.pad(part, (0, 0, 0, length - self.length)) for part in self._parts
            ]
