"""How every trace begins: the image is opened and looked at as numbers."""

from k25_train.data.traces.draw import COLOURS, Draw
from k25_train.data.traces.task import Cell, cell

_LOOK = (
    "I cannot see the image, but I can open it and look at its pixels.",
    "Let me open the file first: its size, and which colours it has.",
    "I start with the size and the most frequent colours.",
    "First I load it as an array and list its colours.",
)


def opening(draw: Draw, file: str, shown: int = 8) -> Cell:
    """Open one image as `img` and `pixels`; prints its size and so many of its most frequent colours."""
    return cell(
        draw.of(_LOOK),
        """
        from PIL import Image
        import numpy as np

        img = Image.open($file).convert("RGB")
        pixels = np.asarray(img)
        print(img.size)
        sorted(img.getcolors(1 << 16), reverse=True)[:$shown]
        """,
        file=file,
        shown=shown,
    )


def named(name: str) -> str:
    """A colour as a thought states it after the list of colours was printed."""
    return f"{name.capitalize()} is {COLOURS[name]}"


BLOBS = '''
def blobs(mask):
    """Areas of touching pixels, as (left, top, right, bottom, size)."""
    left_over, found = mask.copy(), []
    for y, x in np.argwhere(mask).tolist():
        if not left_over[y, x]:
            continue
        left_over[y, x] = False
        stack, xs, ys = [(y, x)], [], []
        while stack:
            y, x = stack.pop()
            xs.append(x)
            ys.append(y)
            for v, u in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if 0 <= v < mask.shape[0] and 0 <= u < mask.shape[1] and left_over[v, u]:
                    left_over[v, u] = False
                    stack.append((v, u))
        found.append((min(xs), min(ys), max(xs) + 1, max(ys) + 1, len(xs)))
    return found
'''
"""Code that finds areas of touching pixels; no library is needed."""
