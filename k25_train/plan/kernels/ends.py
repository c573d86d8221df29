"""Kernels at the ends of the language model: embedding, output head with its loss, multi-token prediction.

Torch-free.

| bytes of a logit in bfloat16, by torch's operations (`k25_train/model/token_losses.py`) | |
|---|---|
| forward | read 2 and written 4; normalised, 8 |
| backward | the same; 4 for the loss's gradient, 12 for its way through the norm, 6 for its rounding |
"""

import math
from collections.abc import Iterator

from k25_train.config.model import LOSS_PIECE_BYTES
from k25_train.plan.head_pieces import rows_of_head
from k25_train.plan.kernels.attention import norm
from k25_train.plan.kernels.kernel import FLOAT32_BYTES
from k25_train.plan.kernels.work import Setting, Work
from k25_train.plan.projections import Projection, head_projection

LOSS_BYTES = 8, 30
"""Bytes of float32 moved for each logit next to those in the model's format."""
LOSS_LAUNCHES = 4, 6
"""Kernels of each piece of logits."""


def embedding(setting: Setting) -> Iterator[Work]:
    """Rows are looked up; their gradients are added in float32."""
    width = setting.tokens * setting.config.model.hidden_size
    forward, backward = (
        2 * setting.element_bytes * width,
        (setting.element_bytes + 2 * FLOAT32_BYTES) * width,
    )
    yield from setting.moved("embedding", forward, backward, launches=(2, 3))


def head(setting: Setting) -> Iterator[Work]:
    """The last norm, logits, and their loss."""
    model, tokens = setting.config.model, setting.tokens
    yield from norm(setting, "last norm", model.hidden_size, made_again="norm.output")
    num_pieces = 1
    if setting.recomputes("head.logits"):
        num_pieces = math.ceil(tokens / rows_of_head(tokens, model.vocab_size, setting.element_bytes))
    # Each piece reads the weights again, and adds to their gradient.
    for _ in range(num_pieces):
        yield from setting.projected(
            head_projection(model), tokens / num_pieces, is_plain=True, made_again="head.logits"
        )
    logits, element = tokens * model.vocab_size, setting.element_bytes
    forward, backward = LOSS_BYTES
    if setting.fuses_elementwise:
        yield from setting.moved("loss", logits * 2 * element, logits * 2 * element)
        return
    loss_pieces = math.ceil(logits * FLOAT32_BYTES / LOSS_PIECE_BYTES)
    launches = LOSS_LAUNCHES[0] * loss_pieces, LOSS_LAUNCHES[1] * loss_pieces
    yield from setting.moved(
        "loss", logits * (forward + element), logits * (backward + element), launches=launches
    )


def before_mtp(setting: Setting) -> Iterator[Work]:
    """Of a layer of multi-token prediction ahead of its decoder layer: features and the next token's
    embedding, each normed, and the product that joins them."""
    hidden = setting.config.model.hidden_size
    yield from norm(setting, "norms of MTP", 2 * hidden, made_again="norm.output")
    yield from setting.projected(Projection("joined features", 2 * hidden, hidden), setting.tokens)
