"""Areas of colours: how many pixels, which share, which is largest, and the shade of a crop."""

from PIL import Image, ImageDraw

from k25_train.data.traces.draw import COLOURS, Box, Draw
from k25_train.data.traces.families.opening import named, opening
from k25_train.data.traces.task import Task, Value, cell


def _rectangles(draw: Draw, difficulty: int) -> tuple[Image.Image, list[tuple[str, Box]]]:
    """Rectangles that do not touch, each of a colour; colours come again in harder ones."""
    size = draw.size(difficulty)
    names = draw.colours(2 + difficulty)
    largest = min(size) // (2 + difficulty)
    sides = [
        (draw.between(largest // 3, largest), draw.between(largest // 3, largest))
        for _ in range(2 + 2 * difficulty)
    ]
    image = Image.new("RGB", size, draw.ground())
    pen = ImageDraw.Draw(image)
    placed = list(zip(names * 3, draw.boxes(size, sides), strict=False))
    for name, box in placed:
        pen.rectangle(box.inclusive, COLOURS[name])
    return image, placed


def pixel_count(draw: Draw, difficulty: int) -> Task:
    """How many pixels have a colour, or which share of the image in percent."""
    image, placed = _rectangles(draw, difficulty)
    file, name = draw.file(), placed[0][0]
    truth: Value
    area = sum((b.right - b.left) * (b.bottom - b.top) for each, b in placed if each == name)
    if draw.chance(0.5):
        question = draw.of(
            (
                f"How many pixels of {file} are {name}?",
                f"Count the {name} pixels in {file}.",
                f"In the image {file}, what is the {name} area in pixels?",
            )
        )
        code, truth = "int((pixels == $rgb).all(axis=-1).sum())", area
        said = lambda value: f"{value:,} pixels of `{file}` are {name}."  # noqa: E731
    else:
        question = draw.of(
            (
                f"Which percentage of {file} is {name}, to one decimal?",
                f"What share of the picture {file} does {name} cover? Give a percentage with one decimal.",
            )
        )
        code = "round(100 * int((pixels == $rgb).all(axis=-1).sum()) / (img.width * img.height), 1)"
        truth = round(100 * area / (image.width * image.height), 1)
        said = lambda value: f"{name.capitalize()} covers {value}% of `{file}`."  # noqa: E731
    return Task(
        images={file: image},
        question=question,
        cells=(
            opening(draw, file),
            cell(f"{named(name)}. I count the pixels that have it.", code, rgb=COLOURS[name]),
        ),
        truth=truth,
        answer=said,
    )


def largest_colour(draw: Draw, difficulty: int) -> Task:
    """Which colour covers most apart from the background."""
    while True:
        image, placed = _rectangles(draw, difficulty)
        areas: dict[str, int] = {}
        for name, box in placed:
            areas[name] = areas.get(name, 0) + (box.right - box.left) * (box.bottom - box.top)
        first, second, *_ = [*sorted(areas.values(), reverse=True), 0]
        free = image.width * image.height - sum(areas.values())
        if first != second and free > first:
            break
    file = draw.file()
    largest = max(areas, key=lambda name: areas[name])
    by_value = {rgb: name for name, rgb in COLOURS.items()}

    def said(value: Value) -> str:
        assert isinstance(value, tuple)
        return f"{by_value[value[:3]].capitalize()} covers the largest area of `{file}`."  # type: ignore[index]

    return Task(
        images={file: image},
        question=draw.of(
            (
                f"Apart from the background, which colour covers the largest area of {file}?",
                f"Which colour is there most of in {file}, not counting the background?",
            )
        ),
        cells=(
            opening(draw, file, 2),
            cell(
                "The most frequent one is the background, so the second one is asked for. I take its value.",
                """
                count, rgb = sorted(img.getcolors(1 << 16), reverse=True)[1]
                rgb
                """,
            ),
        ),
        truth=COLOURS[largest],
        conclusion=f"{COLOURS[largest]} is {largest}.",
        answer=said,
    )


def darkest_quarter(draw: Draw, difficulty: int) -> Task:
    """Which quarter of the image is darkest on average."""
    width, height = (2 * (side // 2) for side in draw.size(difficulty))
    step = {1: 40, 2: 14, 3: 5}[difficulty]
    base = draw.between(60, 120)
    places = ("top left", "top right", "bottom left", "bottom right")
    order = draw.some(range(4), 4)
    image = Image.new("L", (width, height))
    half = (width // 2, height // 2)
    corners = ((0, 0), (half[0], 0), (0, half[1]), half)
    for rank, number in enumerate(order):
        image.paste(
            base + step * rank, (*corners[number], corners[number][0] + half[0], corners[number][1] + half[1])
        )
    file = draw.file()
    return Task(
        images={file: image},
        question=draw.of(
            (
                f"Divide {file} into four quarters. Which of them is darkest on average?",
                f"Which quarter of {file} is the darkest: top left, top right, bottom left or bottom right?",
            )
        ),
        cells=(
            cell(
                "Brightness needs no colours. I open it in grey and halve both sides.",
                """
                from PIL import Image
                import numpy as np

                grey = np.asarray(Image.open($file).convert("L"), dtype=float)
                height, width = grey.shape
                height, width
                """,
                file=file,
            ),
            cell(
                "Now the mean of each quarter; the smallest one is the darkest.",
                """
                quarters = {
                    "top left": grey[: height // 2, : width // 2],
                    "top right": grey[: height // 2, width // 2 :],
                    "bottom left": grey[height // 2 :, : width // 2],
                    "bottom right": grey[height // 2 :, width // 2 :],
                }
                means = {place: float(part.mean()) for place, part in quarters.items()}
                print({place: round(mean, 1) for place, mean in means.items()})
                min(means, key=means.get)
                """,
            ),
        ),
        truth=places[order[0]],
        answer=lambda value: f"The {value} quarter of `{file}` is the darkest.",
    )
