"""The toolset `zoom`: a part of the task's picture, enlarged. It runs nothing, so it needs no sandbox.

Option: `image`, the file in base64.
"""

import asyncio
import base64
import binascii
import io
from collections.abc import Mapping
from typing import Any

from PIL import Image, UnidentifiedImageError

from k25_train.environments.environment import Tool
from k25_train.environments.toolsets.base import Place, ToolResult, declared, wrong
from k25_train.environments.toolsets.options import ToolOptions
from k25_train.errors import ConfigError

MOST_SIDE = 448
"""Pixels of the longer side of what is shown: a part is enlarged in whole steps as long as it fits. Our
choice."""
_EDGE = {"type": "integer", "minimum": 0}
ZOOM = declared(
    "zoom",
    "Show a part of the picture.",
    {"left": _EDGE, "top": _EDGE, "right": _EDGE, "bottom": _EDGE},
    ("left", "top", "right", "bottom"),
)


class Zoom:
    """See `Toolset`, and `Tools`."""

    declarations: tuple[Tool, ...] = (ZOOM,)
    needs_sandbox = False
    is_replayable = True
    files: Mapping[str, bytes] = {}

    def __init__(self, image: Image.Image) -> None:
        """`image`: in RGB, loaded."""
        self._image = image

    async def open(self, place: Place) -> "Zoom":
        """It keeps nothing of an attempt."""
        return self

    async def call(self, name: str, arguments: Mapping[str, Any]) -> ToolResult:
        """The part, in a thread."""
        box = tuple(int(arguments[edge]) for edge in ("left", "top", "right", "bottom"))
        return await asyncio.to_thread(self._part, *box)

    async def close(self) -> None:
        """It holds nothing."""

    def _part(self, left: int, top: int, right: int, bottom: int) -> ToolResult:
        width, height = self._image.size
        right, bottom = min(right, width), min(bottom, height)
        if left >= right or top >= bottom:
            return wrong(f"nothing is there: the picture has {width}x{height} pixels")
        part = self._image.crop((left, top, right, bottom))
        times = max(1, min(4, MOST_SIDE // max(part.size)))
        out = io.BytesIO()
        part.resize((part.width * times, part.height * times), Image.Resampling.NEAREST).save(out, "PNG")
        return ToolResult(text=f"{left}, {top} to {right}, {bottom}:", media=(out.getvalue(),))


def make_zoom(options: Mapping[str, Any]) -> Zoom:
    """Raises ConfigError without an image that can be read."""
    given = ToolOptions("zoom", options)
    encoded = given.take("image", str, "")
    given.end()
    try:
        content = base64.b64decode(encoded, validate=True)
        with Image.open(io.BytesIO(content)) as image:
            return Zoom(image.convert("RGB"))
    except (binascii.Error, UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ConfigError(
            f"toolset zoom: its option image cannot be read ({error})\n  -> an image file, in base64"
        ) from error
