"""What an encoded image is on the wire."""

import base64

_MAGIC = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif", b"RIFF": "image/webp"}


def data_uri(image: bytes) -> str:
    """The file as a `data:` URI; PNG for what is none of the usual ones, since readers look themselves."""
    mime = next((name for magic, name in _MAGIC.items() if image.startswith(magic)), "image/png")
    return f"data:{mime};base64,{base64.b64encode(image).decode()}"


def of_data_uri(uri: str) -> bytes:
    """The file of a `data:` URI. Raises ValueError if it is none."""
    head, found, text = uri.partition(";base64,")
    if not found or not head.startswith("data:"):
        raise ValueError(f"{uri[:40]}: no data: URI in Base64")
    return base64.b64decode(text, validate=True)
