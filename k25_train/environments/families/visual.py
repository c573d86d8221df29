"""Pictures that are looked at with tools: counting, grounding, reading text, reading charts.

A picture is drawn from its seed with Pillow; the agent sees it, and looks closer by code in a sandbox
(`tools: python`, the picture is a file) or by `tools: zoom`, which needs none. What is right is known from
drawing.
"""

import base64
import io
import random
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from k25_train.environments.base import Task
from k25_train.environments.environment import Action
from k25_train.environments.families.counting import CELL, COLOURS, SHAPES, Picture, Shape, count_of, png_of
from k25_train.environments.families.tooled import PYTHON, ZOOM, run_python, tooled
from k25_train.environments.families.words import NAMES
from k25_train.environments.family import Family, Options, Script, call, read_names, say, script

HARDEST = 3
FILE = "picture.png"
WHITE = (255, 255, 255)
_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ23456789"
_IOU_FLOOR = 0.5


class Look(NamedTuple):
    """What is looked at, and asked."""

    kind: str
    """One of `KINDS`."""
    difficulty: int
    """1 or more."""
    seed: int
    """Of the picture."""


class Scene(NamedTuple):
    """A picture, drawn."""

    png: bytes
    question: str
    answer: str
    """As it is to be said."""
    judge: str
    reference: Any
    """What the judge compares with."""
    guess: str
    """What is said by who has not looked; wrong."""
    box: tuple[int, int, int, int]
    """Where to look, in pixels: left, top, right, bottom."""


class Visual(Family[Look]):
    """Pictures; those of one kind and difficulty are one problem."""

    name = "visual"

    def __init__(self, options: Mapping[str, str]) -> None:
        """Options: `kinds` (names with commas), `difficulty` (a range up to 3), `tools` (python, zoom),
        `wrong`. Raises ConfigError."""
        given = Options(self.name, options)
        self._kinds = given.names("kinds", KINDS)
        self._difficulty = given.difficulty(HARDEST)
        tools = given.take("tools", PYTHON, read_names((PYTHON, ZOOM)), "must be python, zoom or both")
        self._tools = tools
        self.wrong = given.wrong()
        given.end()

    def draw(self, rng: random.Random) -> Look:
        """See `Family`."""
        return Look(rng.choice(self._kinds), rng.choice(self._difficulty), rng.randrange(1 << 31))

    def asked(self, content: Look) -> object:
        """See `Family`: what is seen, not the number that it is drawn from."""
        scene = scene_of(content)
        return scene.png, scene.question

    def make(self, key: str, content: Look) -> Task:
        """See `Family`."""
        scene = scene_of(content)
        image = base64.b64encode(scene.png).decode()
        options: dict[str, dict[str, Any]] = {PYTHON: {}, ZOOM: {"image": image}}
        files = {FILE: {"media": 0}} if PYTHON in self._tools else {}
        where = f" The picture is {FILE}." if files else ""
        return tooled(
            key=key,
            family=self.name,
            prompt=[
                {"type": "image", "image": "0"},
                {"type": "text", "text": scene.question + where},
            ],
            media=(scene.png,),
            toolsets={name: options[name] for name in self._tools},
            files=files,
            reference=scene.reference,
            judge=scene.judge,
            problem=f"{self.name}/{content.kind}/{content.difficulty}",
        )

    def solve(self, content: Look) -> Script:
        """See `Family`."""
        scene = scene_of(content)
        return script(self._look(scene.box), say(scene.answer))

    def cheats(self, content: Look) -> Mapping[str, Script]:
        """See `Family`."""
        scene = scene_of(content)
        return {
            "guess": (say(scene.guess),),
            "look and guess": script(self._look(scene.box), say(scene.guess)),
            "no answer": script(self._look(scene.box), say("It is in the picture.")),
        }

    def _look(self, box: tuple[int, int, int, int]) -> Action:
        if PYTHON in self._tools:
            return run_python(f"from PIL import Image\nImage.open('{FILE}').crop({box})")
        return call(ZOOM, **dict(zip(("left", "top", "right", "bottom"), box, strict=True)))


def scene_of(look: Look) -> Scene:
    """The picture of a content, and what is asked of it."""
    return KINDS[look.kind](random.Random(f"picture {look}"), look.difficulty)


def _count(rng: random.Random, difficulty: int) -> Scene:
    side = (2, 5, 9)[difficulty - 1]
    places = sorted(rng.sample(range(side**2), rng.randint(1, max(2, side**2 // 2))))
    shapes = tuple(Shape(place, rng.choice(SHAPES), rng.choice(list(COLOURS))) for place in places)
    picture = Picture(side, shapes, rng.choice(shapes).colour)
    count = count_of(picture)
    whole = (0, 0, side * CELL, side * CELL)
    return Scene(
        png_of(picture), f"How many are {picture.colour}?", str(count), "answer", str(count),
        str(count + 1), whole,
    )  # fmt: skip


def _find(rng: random.Random, difficulty: int) -> Scene:
    side = 112 * difficulty
    image = Image.new("RGB", (side, side), WHITE)
    canvas = ImageDraw.Draw(image)
    kinds = [(colour, kind) for colour in COLOURS for kind in SHAPES]
    cells = rng.sample(range(9), min(9, len(kinds)))
    rng.shuffle(kinds)
    boxes = []
    for cell, (colour, kind) in zip(cells[: 2 * difficulty], kinds, strict=False):
        size = rng.randint(side // 8, side // 4)
        left = cell % 3 * side // 3 + rng.randint(0, side // 3 - size - 2)
        top = cell // 3 * side // 3 + rng.randint(0, side // 3 - size - 2)
        box = (left, top, left + size, top + size)
        (canvas.ellipse if kind == "disc" else canvas.rectangle)(box, fill=COLOURS[colour])
        boxes.append((box, colour, kind))
    box, colour, kind = boxes[0]
    return Scene(
        _png(image),
        f"Where is the {colour} {kind}? Answer [left, top, right, bottom] in pixels.",
        str(list(box)), "boxes", {"boxes": [list(box)], "iou_floor": _IOU_FLOOR},
        str([0, 0, side, side]), box,
    )  # fmt: skip


def _read(rng: random.Random, difficulty: int) -> Scene:
    text = "".join(rng.choices(_LETTERS, k=2 + 2 * difficulty))
    font = ImageFont.load_default(size=24 // difficulty)
    left, top, right, bottom = (int(edge) for edge in font.getbbox(text))
    width, height = right - left, bottom - top
    size = (width + 56 * difficulty, height + 56 * difficulty)
    image = Image.new("RGB", size, WHITE)
    x, y = rng.randint(4, size[0] - width - 4), rng.randint(4, size[1] - height - 4)
    ImageDraw.Draw(image).text((x - left, y - top), text, fill=COLOURS[rng.choice(list(COLOURS))], font=font)
    guess = text[::-1] if text != text[::-1] else f"{text}{text}"
    return Scene(
        _png(image), "What is written in the picture?", text, "text", {"answers": [text]}, guess,
        (x - 4, y - 4, x + width + 4, y + height + 4),
    )  # fmt: skip


def _chart(rng: random.Random, difficulty: int) -> Scene:
    names = rng.sample(NAMES, 1 + 2 * difficulty)
    step = (10, 5, 1)[difficulty - 1]
    values = [step * rng.randint(1, 100 // step) for _ in names]
    width, height, base = 70 * len(names) + 40, 260, 230
    image = Image.new("RGB", (width, height), WHITE)
    canvas = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=12)
    for tick in range(0, 101, 20):
        canvas.line((30, base - 2 * tick, width, base - 2 * tick), fill=(200, 200, 200))
        canvas.text((4, base - 2 * tick - 7), str(tick), fill=(0, 0, 0), font=font)
    for place, (name, value) in enumerate(zip(names, values, strict=True)):
        left = 40 + 70 * place
        canvas.rectangle((left, base - 2 * value, left + 40, base), fill=COLOURS["blue"])
        canvas.text((left, base + 6), name, fill=(0, 0, 0), font=font)
    asked = rng.randrange(len(names))
    left = 40 + 70 * asked
    return Scene(
        _png(image), f"How high is the bar of {names[asked]}?", str(values[asked]), "number",
        {"answer": values[asked]}, str(values[asked] + step), (left - 10, 0, left + 60, height),
    )  # fmt: skip


KINDS: Mapping[str, Callable[[random.Random, int], Scene]] = {
    "count": _count,
    "find": _find,
    "read": _read,
    "chart": _chart,
}
"""Name -> what draws a picture of that kind and difficulty."""


def _png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()
