"""What routed experts compute with: their weights, or what INT4 stands for (`model.quantization=int4_qat`).

```
 float32 masters ─► weights (gathered) ─► fake quantisation, once per run of a schedule ─► copy
        ▲                  │                                                                 │
     update                └──► checkpoint, norms, QK-Clip            outputs, gradients of rows
        ▲                                                                                    │
        └──────────── main_grad ◄── gradients of weights, straight through ◄─────────────────┘
```

Forward and backward multiply with the copy; the gradient that arrives there is that of the weights, unchanged
(the straight-through estimator of Bengio et al., arXiv 1308.3432). It is the identity everywhere. Nothing
lies outside what the codes reach, since the scale follows the largest weight of each group, so there is
nothing to clip; that the largest weight also moves the scale is left out, as in Moonshot's description of
K2-Thinking's INT4 and in the open reproductions (slime, miles, SkyRL). K2.5's own choice is not disclosed.

**Which numbers.** Those of `k25_train/int4.py`: of the weights rounded to bfloat16, as an export writes them.
They are bfloat16 numbers in a float32 run, too, since that is what engines unpack INT4 to.

**When.** Weights change between two runs of a schedule only, so each copy is made in the first pass of a run
that needs it, behind data parallelism's gather of that layer, and not once for each micro-batch. The price is
the memory of one copy of the rank's routed experts (`StageMemory.quantized`). Rounding the gathered
weights in place would need none, but float32 weights are their own masters, and checkpoints would hold
weights of which nobody knows whether they are rounded.
"""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from k25_train.config.model import Quantization
from k25_train.int4 import fake_quantize, fake_quantize_into


class ComputedWeights(nn.Module):
    """Gives the weights that a module computes with."""

    @abstractmethod
    def of(self, name: str, weights: nn.Parameter) -> Tensor:
        """What to multiply with instead of the parameter `weights`, which is called `name`; valid until the
        weights change."""


class AsKept(ComputedWeights):
    """The weights themselves."""

    def of(self, name: str, weights: nn.Parameter) -> Tensor:
        """The parameter."""
        return weights


class AsInt4(ComputedWeights):
    """What INT4 stands for, in copies that are no part of a checkpoint.

    While a schedule runs (`parallel/megatron/held_weights.py`), each copy is made once. Elsewhere nobody says
    when weights change, and every call makes one.
    """

    def __init__(self, **weights: nn.Parameter) -> None:
        """
        Args:
            weights: by name; [E, out, in], inputs in whole groups.
        """
        super().__init__()
        self._is_held = False
        self._made: set[str] = set()
        for name, each in weights.items():
            self.register_buffer(name, torch.empty_like(each, requires_grad=False), persistent=False)

    def of(self, name: str, weights: nn.Parameter) -> Tensor:
        """The copy, made now unless it is there."""
        if not self._is_held:
            return fake_quantize(weights)
        copy: Tensor = getattr(self, name)
        if name not in self._made:
            fake_quantize_into(copy, weights)
            self._made.add(name)
        return copy

    def hold_weights(self) -> None:
        """From here on weights do not change until `release_weights`."""
        self._is_held = True
        self._made.clear()

    def release_weights(self) -> None:
        """Weights may change again."""
        self._is_held = False


def computed_weights(quantization: Quantization, **weights: nn.Parameter) -> ComputedWeights:
    """What `model.quantization` says of these weights [E, out, in], by name."""
    return AsInt4(**weights) if quantization is Quantization.int4_qat else AsKept()
