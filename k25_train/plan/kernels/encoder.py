"""What the vision tower and its projector compute of a chunk of images, forward; torch-free."""

from collections.abc import Iterator

from k25_train.config.schema import Config
from k25_train.config.vision import VisionPart
from k25_train.plan.kernels.kernel import Attention, Kernel, Moved, Product
from k25_train.plan.weight_bytes import WEIGHT_BYTES
from parallel.dep.grid import Grid

BLOCK_MOVES = 16
"""Widths of a patch that a block reads or writes in kernels which compute next to nothing: two norms 2 each,
two additions to the residual 3 each, rotation of queries and keys 4, values put in order 2."""
BLOCK_LAUNCHES = 8
"""Kernels of these."""


def encoder_kernels(config: Config, image: Grid, num_images: int) -> Iterator[Kernel]:
    """A forward pass of what every rank has of vision, or a first stage if the tower is coupled.

    Args:
        config: the configuration.
        image: the size of each.
        num_images: encoded together; their patches attend to those of the same image.
    """
    vision = config.model.vision
    patches, width, hidden = num_images * image.num_patches, vision.hidden_size, vision.ffn_hidden_size
    size, element = width // vision.num_attention_heads, WEIGHT_BYTES[config.train.dtype]
    # 1. The tower; its blocks are alike.
    yield Product("patches", patches, width, 3 * vision.patch_size**2)
    for _ in range(vision.num_layers):
        yield Product("queries, keys, values", patches, 3 * width, width)
        yield Attention(
            "attention",
            pairs=num_images * image.num_patches**2,
            tokens=patches,
            heads=vision.num_attention_heads,
            qk_width=size,
            v_width=size,
        )
        yield Product("output", patches, width, width)
        yield Product("up", patches, hidden, width)
        yield Product("down", patches, width, hidden)
        yield Moved("rest", patches * (BLOCK_MOVES * width + 2 * hidden) * element, BLOCK_LAUNCHES)
    # 2. The projector.
    parts = config.vision_placement.encoder_parts
    if not parts or VisionPart.projector in parts:
        tokens, merged = num_images * image.num_tokens, vision.merged_size
        yield Product("projector", tokens, merged, merged)
        yield Product("projector", tokens, config.model.hidden_size, merged)
