"""Objects: how many there are, where one is, how far two are apart, and what changed between two images."""

import math

from PIL import Image, ImageDraw

from k25_train.data.traces.draw import COLOURS, Box, Draw
from k25_train.data.traces.families.opening import BLOBS, named, opening
from k25_train.data.traces.task import Cell, Task, Value, cell

_SHAPES = ("circle", "square", "diamond")
_SIDES = {1: (11, 21), 2: (13, 27), 3: (15, 33)}


def _shape(pen: ImageDraw.ImageDraw, kind: str, box: Box, name: str) -> None:
    left, top, right, bottom = box.inclusive
    if kind == "circle":
        pen.ellipse(box.inclusive, COLOURS[name])
    elif kind == "square":
        pen.rectangle(box.inclusive, COLOURS[name])
    else:
        x, y = (left + right) / 2, (top + bottom) / 2
        pen.polygon([(left, y), (x, top), (right, y), (x, bottom)], COLOURS[name])


def _odd(draw: Draw, difficulty: int) -> tuple[int, int]:
    side = 2 * draw.between(_SIDES[difficulty][0] // 2, _SIDES[difficulty][1] // 2) + 1
    return side, side


def count(draw: Draw, difficulty: int) -> Task:
    """How many objects of a colour there are; of the hardest, only those of one shape."""
    size = draw.size(difficulty)
    asked, *others = draw.colours(1 + difficulty)
    shape = draw.of(_SHAPES[:2])
    wanted = draw.between(1, 2 + 2 * difficulty)
    kinds = [(asked, shape)] * wanted
    if difficulty == 3:
        kinds += [(asked, "square" if shape == "circle" else "circle")] * draw.between(1, 3)
    kinds += [(name, draw.of(_SHAPES)) for name in others for _ in range(draw.between(1, 3))]
    image = Image.new("RGB", size, draw.ground())
    pen = ImageDraw.Draw(image)
    placed = list(zip(kinds, draw.boxes(size, [_odd(draw, difficulty) for _ in kinds]), strict=False))
    for (name, kind), box in placed:
        _shape(pen, kind, box, name)
    file = draw.file()
    truth = sum(kind == (asked, shape) for kind, _ in placed)
    first = opening(draw, file)
    code = BLOBS + "\nfound = blobs((pixels == $rgb).all(axis=-1))\nprint(found)\n"
    if difficulty == 3:
        thought = (
            f"{named(asked)}. I find its areas. A square fills its box, a circle pi/4 of it, which tells "
            "them apart."
        )
        over = ">" if shape == "square" else "<"
        code += f"len([1 for l, t, r, b, size in found if size / ((r - l) * (b - t)) {over} 0.9])"
        what = f"{asked} {shape}s"
    else:
        thought = f"{named(asked)}. Objects do not touch each other, so each is one area of that colour."
        code += "len(found)"
        what = f"{asked} objects"
    return Task(
        images={file: image},
        question=draw.of(
            (f"How many {what} are in {file}?", f"Count the {what} in {file}.", f"{file}: number of {what}?")
        ),
        cells=(first, cell(thought, code, rgb=COLOURS[asked])),
        truth=truth,
        answer=lambda value: (
            f"There is 1 {what[:-1]} in `{file}`." if value == 1 else f"There are {value} {what} in `{file}`."
        ),
    )


def box(draw: Draw, difficulty: int) -> Task:
    """The box around the only object of a colour, in pixels or in thousandths of the sides."""
    size = draw.size(difficulty)
    names = draw.colours(1 + 2 * difficulty)
    sides = [(draw.between(12, min(size) // 4), draw.between(12, min(size) // 4)) for _ in names]
    places = draw.boxes(size, sides)
    image = Image.new("RGB", size, draw.ground())
    pen = ImageDraw.Draw(image)
    for name, place in zip(names, places, strict=False):
        if draw.chance(0.5):
            pen.rectangle(place.inclusive, COLOURS[name])
        else:
            pen.ellipse(place.inclusive, COLOURS[name])
    file, name, place = draw.file(), names[0], places[0]
    edges = (place.left, place.top, place.right, place.bottom)
    code = """
        ys, xs = np.nonzero((pixels == $rgb).all(axis=-1))
        left, top, right, bottom = int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1
        """
    if difficulty < 3:
        question = draw.of(
            (
                f"Where is the {name} object in {file}? Give (left, top, right, bottom) in pixels.",
                f"Give the bounding box of the {name} object in {file}, in pixels.",
            )
        )
        code += "left, top, right, bottom"
        truth = edges
    else:
        question = f"Give the box of the {name} object in {file} in thousandths of width and height."
        code += """
        width, height = img.size
        tuple(round(1000 * at / side) for at, side in zip((left, top, right, bottom), (width, height) * 2))
        """
        truth = tuple(round(1000 * at / side) for at, side in zip(edges, size * 2, strict=True))  # type: ignore[assignment]
    return Task(
        images={file: image},
        question=question,
        cells=(
            opening(draw, file),
            cell(f"{named(name)}. Its first and last columns and rows are the box.", code, rgb=COLOURS[name]),
        ),
        truth=truth,
        answer=lambda value: f"The {name} object is at {list(value)}.",  # type: ignore[arg-type]
    )


def distance(draw: Draw, difficulty: int) -> Task:
    """How far the centres of two squares are apart, to one decimal."""
    size = draw.size(difficulty)
    names = draw.colours(2 * difficulty)
    places = draw.boxes(size, [_odd(draw, 1) for _ in names])
    image = Image.new("RGB", size, draw.ground())
    pen = ImageDraw.Draw(image)
    for name, place in zip(names, places, strict=False):
        _shape(pen, "square", place, name)
    file, (one, other) = draw.file(), names[:2]
    centres = [((b.left + b.right - 1) / 2, (b.top + b.bottom - 1) / 2) for b in places[:2]]
    return Task(
        images={file: image},
        question=draw.of(
            (
                f"How far apart are the centres of the {one} and the {other} square in {file}, in pixels "
                "with one decimal?",
                f"Measure the distance from the {one} to the {other} square of {file}, centre to centre, "
                "to a tenth of a pixel.",
            )
        ),
        cells=(
            opening(draw, file),
            cell(
                f"{named(one)}, {other} is {COLOURS[other]}. A centre is between first and last pixel.",
                """
                def centre(rgb):
                    ys, xs = np.nonzero((pixels == rgb).all(axis=-1))
                    return (int(xs.min()) + int(xs.max())) / 2, (int(ys.min()) + int(ys.max())) / 2

                one, other = centre($one), centre($other)
                one, other
                """,
                one=COLOURS[one],
                other=COLOURS[other],
            ),
            cell("Both are there. Now the distance.", "import math\n\nround(math.dist(one, other), 1)"),
        ),
        truth=round(math.dist(*centres), 1),
        answer=lambda value: f"The centres are {value} pixels apart.",
    )


def difference(draw: Draw, difficulty: int) -> Task:
    """How many objects are gone in the second image, or the box of what is."""
    size = draw.size(difficulty)
    names = draw.colours(3 + difficulty)
    places = draw.boxes(size, [_odd(draw, difficulty) for _ in range(3 + 2 * difficulty)])
    objects = [(draw.of(names), draw.of(_SHAPES), place) for place in places]
    gone = objects[: draw.between(1, max(1, len(objects) // 2))]
    ground = draw.ground()
    before = Image.new("RGB", size, ground)
    pen = ImageDraw.Draw(before)
    for name, kind, place in objects:
        _shape(pen, kind, place, name)
    after = before.copy()
    pen = ImageDraw.Draw(after)
    for _, _, place in gone:
        pen.rectangle(place.inclusive, ground)
    stem, extension = draw.file().split(".")
    files = f"{stem}_before.{extension}", f"{stem}_after.{extension}"
    first = cell(
        draw.of(
            ("I open both and compare them pixel by pixel.", "Two images of the same size can be subtracted.")
        ),
        """
        from PIL import Image, ImageChops
        import numpy as np

        before, after = (Image.open(name).convert("RGB") for name in ($one, $other))
        print(before.size, after.size)
        changed = np.asarray(ImageChops.difference(before, after)).any(axis=-1)
        int(changed.sum())
        """,
        one=files[0],
        other=files[1],
    )
    return _gone(draw, files, {files[0]: before, files[1]: after}, first, [place for *_, place in gone])


def _gone(
    draw: Draw, files: tuple[str, str], images: dict[str, Image.Image], first: Cell, gone: list[Box]
) -> Task:
    if len(gone) == 1 and draw.chance(0.5):
        # All shapes touch the four sides of their boxes.
        truth: Value = (gone[0].left, gone[0].top, gone[0].right, gone[0].bottom)
        question = f"One object of {files[0]} is missing in {files[1]}. Where was it? Give its box in pixels."
        second = cell(
            "What changed is the object. Its box:",
            """
            ys, xs = np.nonzero(changed)
            int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1
            """,
        )
        said = lambda value: f"It was at {list(value)}."  # noqa: E731
    else:
        truth = len(gone)
        question = draw.of(
            (
                f"How many objects of {files[0]} are missing in {files[1]}?",
                f"Compare {files[0]} with {files[1]}: how many objects have been removed?",
            )
        )
        second = cell(
            "Objects do not touch, so each one that is gone is one area that changed.",
            BLOBS + "\nlen(blobs(changed))",
        )
        said = lambda value: (  # noqa: E731
            "1 object is missing." if value == 1 else f"{value} objects are missing."
        )
    return Task(images=images, question=question, cells=(first, second), truth=truth, answer=said)
