"""Seeds for servers that draw a request's tokens from one stream."""

import hashlib


def seed_at(seed: int, position: int) -> int:
    """A seed for what follows `position` tokens, 0 to 2^63 - 1: a server starts over with each request, and
    would draw the same for another part of the response."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
