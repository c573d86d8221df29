"""Instruments: the digits of a display, the bars of a chart, the needle of a gauge."""

import math
from collections.abc import Callable

from PIL import Image, ImageDraw

from k25_train.data.traces.draw import COLOURS, Box, Draw
from k25_train.data.traces.families.opening import named, opening
from k25_train.data.traces.task import Task, Value, cell

SEGMENTS = ("abcdef", "bc", "abged", "abgcd", "fgbc", "afgcd", "afgedc", "abc", "abcdefg", "abcdfg")
"""Digit -> its lit segments: a top, b and c right, d bottom, e and f left, g middle."""


def _bars(box: Box, thick: int) -> dict[str, Box]:
    """Segment -> its rectangle, in a digit's box."""
    left, top, right, bottom = box.left, box.top, box.right, box.bottom
    middle = (top + bottom - thick) // 2
    return {
        "a": Box(left, top, right, top + thick),
        "g": Box(left, middle, right, middle + thick),
        "d": Box(left, bottom - thick, right, bottom),
        "f": Box(left, top, left + thick, middle),
        "b": Box(right - thick, top, right, middle),
        "e": Box(left, middle + thick, left + thick, bottom),
        "c": Box(right - thick, middle + thick, right, bottom),
    }


def display(draw: Draw, difficulty: int) -> Task:
    """The number on a display of seven segments, whose unlit ones are faintly visible."""
    num_digits = draw.between(1, 2) + difficulty
    digits = [draw.between(0, 9) for _ in range(num_digits)]
    thick = draw.between(2, 2 + difficulty)
    width, height = draw.between(5, 7) * thick, draw.between(9, 12) * thick
    gap, margin = draw.between(2, 4) * thick, draw.between(4, 20)
    panel, faint = (24, 26, 28), (52, 54, 56)
    name = draw.of(("red", "green", "cyan", "orange"))
    size = num_digits * (width + gap) - gap + 2 * margin, height + 2 * margin
    image = Image.new("RGB", size, panel)
    pen = ImageDraw.Draw(image)
    for number, digit in enumerate(digits):
        left = margin + number * (width + gap)
        for segment, bar in _bars(Box(left, margin, left + width, margin + height), thick).items():
            if segment not in SEGMENTS[digit]:
                pen.rectangle(bar.inclusive, faint)
        for segment, bar in _bars(Box(left, margin, left + width, margin + height), thick).items():
            if segment in SEGMENTS[digit]:
                pen.rectangle(bar.inclusive, COLOURS[name])
    file = draw.file()
    return Task(
        images={file: image},
        question=draw.of(
            (
                f"What does the seven-segment display in {file} read?",
                f"{file} shows a digital display. Which number is on it?",
                f"Read the number on the display of {file}.",
            )
        ),
        cells=(
            opening(draw, file),
            cell(
                f"{named(name)}: lit segments. {panel} is the panel and {faint} are segments that are off. "
                "Whatever is not panel tells where the digits are: columns without any separate them.",
                """
                lit = (pixels == $rgb).all(axis=-1)
                any_segment = (pixels != $panel).any(axis=-1)
                rows = np.nonzero(any_segment.any(axis=1))[0]
                columns = np.nonzero(any_segment.any(axis=0))[0]
                cuts = np.nonzero(np.diff(columns) > 1)[0]
                starts = [int(columns[0]), *(int(columns[cut + 1]) for cut in cuts)]
                stops = [*(int(columns[cut]) + 1 for cut in cuts), int(columns[-1]) + 1]
                top, bottom = int(rows[0]), int(rows[-1]) + 1
                list(zip(starts, stops)), top, bottom
                """,
                rgb=COLOURS[name],
                panel=panel,
            ),
            cell(
                "In each digit I look at the middle of its seven segments: a top, b and c right, d bottom, "
                "e and f left, g in the middle.",
                """
                digit_of = {"abcdef": 0, "bc": 1, "abdeg": 2, "abcdg": 3, "bcfg": 4,
                            "acdfg": 5, "acdefg": 6, "abc": 7, "abcdefg": 8, "abcdfg": 9}
                def digit(left, right):
                    h, x = bottom - top, (left + right) // 2
                    upper, lower = top + h // 4, top + 3 * h // 4
                    places = {"a": (top, x), "b": (upper, right - 1), "c": (lower, right - 1),
                              "d": (bottom - 1, x), "e": (lower, left), "f": (upper, left),
                              "g": ((top + bottom) // 2, x)}
                    return digit_of["".join(name for name, place in places.items() if lit[place])]

                "".join(str(digit(left, right)) for left, right in zip(starts, stops))
                """,
            ),
        ),
        truth="".join(map(str, digits)),
        answer=lambda value: f"The display reads {value}.",
    )


def chart(draw: Draw, difficulty: int) -> Task:
    """The value of a bar, the difference of two, or the largest, by the height of the axis."""
    names = draw.colours(2 + difficulty)
    top_value = draw.of((10, 20, 50)) if difficulty == 1 else draw.of((40, 60, 80))
    scale = max(1, {1: 80, 2: 140, 3: 240}[difficulty] // top_value)
    values = draw.some(range(1, top_value + 1), len(names))
    width, gap, margin = draw.between(10, 24), draw.between(6, 14), draw.between(8, 24)
    axis_height = scale * top_value
    size = 2 * margin + 2 + len(names) * (width + gap), axis_height + 2 * margin
    image = Image.new("RGB", size, (255, 255, 255))
    pen = ImageDraw.Draw(image)
    base = margin + axis_height
    pen.rectangle((margin, margin, margin, base - 1), (0, 0, 0))
    pen.rectangle((margin, base, size[0] - margin, base), (0, 0, 0))
    for number, (name, value) in enumerate(zip(names, values, strict=True)):
        left = margin + 2 + gap + number * (width + gap)
        pen.rectangle((left, base - scale * value, left + width - 1, base - 1), COLOURS[name])
    file = draw.file()
    of = dict(zip(names, values, strict=True))
    asked, question, code, truth, said = _asked_of(draw, of, file)
    scale_cell = cell(
        f"Black are the axes: the vertical one stands for {top_value}, without the line below it. "
        f"{'; '.join(f'{each} is {COLOURS[each]}' for each in asked)}.",
        """
        black = (pixels == 0).all(axis=-1)
        axis = black[:, np.nonzero(black.any(axis=0))[0][0]]
        axis_height = int(axis.sum()) - 1

        def value(rgb):
            height = int((pixels == rgb).all(axis=-1).any(axis=1).sum())
            return round(height * $top / axis_height)

        """
        + code,
        top=top_value,
        **{f"rgb{number}": COLOURS[name] for number, name in enumerate(asked)},
    )
    return Task(
        images={file: image},
        question=f"{question} Its axis goes from 0 to {top_value}.",
        cells=(opening(draw, file, 10), scale_cell),
        truth=truth,
        answer=said,
    )


def _asked_of(
    draw: Draw, of: dict[str, int], file: str
) -> tuple[list[str], str, str, int, Callable[[Value], str]]:
    """(colours that are looked at, question, last line of the code, truth, answer)."""
    names = list(of)
    kind = draw.between(1, 3)
    if kind == 1:
        name = names[0]
        question = f"Which value has the {name} bar of the chart {file}?"
        return names[:1], question, "value($rgb0)", of[name], lambda v: f"The {name} bar has the value {v}."
    if kind == 2:
        one, other = names[:2]
        question = f"By how much do the {one} and the {other} bar of the chart {file} differ?"
        said = lambda v: f"They differ by {v}."  # noqa: E731
        return names[:2], question, "abs(value($rgb0) - value($rgb1))", abs(of[one] - of[other]), said
    bars = ", ".join(f"$rgb{number}" for number in range(len(names)))
    question = f"What is the largest value of the bar chart {file}?"
    return names, question, f"max(value(rgb) for rgb in ({bars}))", max(of.values()), lambda v: f"It is {v}."


def gauge(draw: Draw, difficulty: int) -> Task:
    """What a needle points at, on a scale along an arc."""
    low, high = draw.of(((0, 100), (0, 60), (20, 120), (-40, 40)))
    step = (high - low) // {1: 10, 2: 20, 3: 20}[difficulty]
    value = low + step * draw.between(0, (high - low) // step)
    radius = draw.between(40, 50 + 25 * difficulty)
    centre = radius + draw.between(8, 20)
    image = Image.new("RGB", (2 * centre + 1, 2 * centre + 1), draw.ground())
    pen = ImageDraw.Draw(image)
    rim = draw.of(("blue", "purple", "brown"))
    pen.ellipse(
        (centre - radius, centre - radius, centre + radius, centre + radius), outline=COLOURS[rim], width=3
    )
    angle = math.radians(180 - 180 * (value - low) / (high - low))
    tip = centre + 0.85 * radius * math.cos(angle), centre - 0.85 * radius * math.sin(angle)
    pen.line((centre, centre, *tip), COLOURS["red"], 3)
    file = draw.file()

    def said(found: Value) -> str:
        return f"The needle points at {found}."

    return Task(
        images={file: image},
        question=(
            f"{file} shows a round gauge with a red needle. Its scale goes from {low} at the far left over "
            f"the top to {high} at the far right, in steps of {step}. What does it show?"
        ),
        cells=(
            opening(draw, file),
            cell(
                f"The rim gives the centre: {rim} is {COLOURS[rim]}. The needle is {COLOURS['red']}; the "
                "mean of its pixels lies on its line.",
                """
                ys, xs = np.nonzero((pixels == $rim).all(axis=-1))
                cx, cy = (int(xs.min()) + int(xs.max())) / 2, (int(ys.min()) + int(ys.max())) / 2
                ys, xs = np.nonzero((pixels == $red).all(axis=-1))
                dx, dy = float(xs.mean()) - cx, cy - float(ys.mean())
                angle = float(np.degrees(np.arctan2(dy, dx))) % 360
                print(round(angle, 1))
                """,
                rim=COLOURS[rim],
                red=COLOURS["red"],
            ),
            cell(
                "180 degrees is the far left and 0 the far right. Angles just below zero count as zero.",
                """
                turned = angle - 360 if angle > 270 else angle
                share = min(max((180 - turned) / 180, 0), 1)
                round(share * $span / $step) * $step + $low
                """,
                span=high - low,
                step=step,
                low=low,
            ),
        ),
        truth=value,
        answer=said,
    )
