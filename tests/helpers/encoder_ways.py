"""The ways in which the encoder is run, and the layouts in which they are compared."""

import itertools

SMOKE = {"pp": 2, "vpp": 2, "ep": 2, "dp": 2}
# With as slow a network as gloo's, hardly anything of so small a model is worth sending between passes.
BUBBLES = ("dep.schedule=bubbles", "cluster.network_gb_per_s=1000")
WAYS = {"coupled": ("dep.mode=coupled",), "upfront": (), "bubbles": BUBBLES}


def layouts() -> list[dict[str, int]]:
    """pp 1 to 4, and vpp, ep and dp of 1 and 2, as far as they go together."""
    sizes = itertools.product((1, 2, 4), (1, 2), (1, 2), (1, 2))
    return [
        {"pp": pp, "vpp": vpp, "ep": ep, "dp": dp}
        for pp, vpp, ep, dp in sizes
        if dp % ep == 0 and (pp > 1 or vpp == 1)
    ]
