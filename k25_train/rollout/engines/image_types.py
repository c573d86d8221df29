"""What an encoded image is called on the wire."""

_MAGIC = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif", b"RIFF": "image/webp"}


def mime_type(image: bytes) -> str:
    """MIME type by the first bytes; PNG for what is none of the usual ones, since readers look themselves."""
    return next((name for magic, name in _MAGIC.items() if image.startswith(magic)), "image/png")
