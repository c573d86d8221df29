"""Space: how an image looks after it was turned, and the shortest way through a maze."""

from collections import deque

from PIL import Image, ImageDraw

from k25_train.data.traces.draw import COLOURS, Draw
from k25_train.data.traces.families.opening import opening
from k25_train.data.traces.task import Task, Value, cell

_TURNS = {
    "turned clockwise by a quarter": ("img.rotate(-90, expand=True)", (2, 0, 3, 1)),
    "turned anticlockwise by a quarter": ("img.rotate(90, expand=True)", (1, 3, 0, 2)),
    "turned by half": ("img.rotate(180)", (3, 2, 1, 0)),
    "mirrored left to right": ("img.transpose(Image.Transpose.FLIP_LEFT_RIGHT)", (1, 0, 3, 2)),
    "flipped upside down": ("img.transpose(Image.Transpose.FLIP_TOP_BOTTOM)", (2, 3, 0, 1)),
}
"""How -> its code, and for each corner afterwards the one that it was before."""
_CORNERS = ("top left", "top right", "bottom left", "bottom right")


def turned(draw: Draw, difficulty: int) -> Task:
    """Which colour is in a corner after one or more turns."""
    width, height = draw.size(difficulty)
    names = draw.colours(4)
    side = draw.between(10, min(width, height) // 3)
    image = Image.new("RGB", (width, height), draw.ground())
    for name, (left, top) in zip(
        names, ((0, 0), (width - side, 0), (0, height - side), (width - side, height - side)), strict=True
    ):
        image.paste(COLOURS[name], (left, top, left + side, top + side))
    hows = [draw.of(list(_TURNS)) for _ in range(difficulty)]
    order = [0, 1, 2, 3]
    for how in hows:
        order = [order[before] for before in _TURNS[how][1]]
    corner = draw.between(0, 3)
    file = draw.file()
    by_value = {rgb: name for name, rgb in COLOURS.items()}

    def said(value: Value) -> str:
        return f"The {_CORNERS[corner]} corner is {by_value[value]} then."  # type: ignore[index]

    x, y = ("0", "img.width - 1")[corner % 2], ("0", "img.height - 1")[corner // 2]
    cells = [opening(draw, file)]
    for number, how in enumerate(hows):
        thought = "The turn is one call of Pillow." if number == 0 else "The next one, on what I have."
        cells.append(cell(thought, f"img = {_TURNS[how][0]}\nimg.size"))
    cells.append(cell("Now the corner.", f"img.getpixel(({x}, {y}))"))
    return Task(
        images={file: image},
        question=(
            f"Imagine {file} {', then '.join(hows)}. Which colour is in its {_CORNERS[corner]} corner "
            "afterwards?"
        ),
        cells=tuple(cells),
        truth=COLOURS[names[order[corner]]],
        conclusion=f"{COLOURS[names[order[corner]]]} is {names[order[corner]]}.",
        answer=said,
    )


def maze(draw: Draw, difficulty: int) -> Task:
    """How many steps the shortest way through a maze has."""
    rows, columns = (2 * draw.between(1 + difficulty, 2 + 2 * difficulty) + 1 for _ in range(2))
    free = _carved(draw, rows, columns, difficulty)
    start, goal = (1, 1), (rows - 2, columns - 2)
    side = draw.between(5, 12)
    image = Image.new("RGB", (columns * side, rows * side), (0, 0, 0))
    pen = ImageDraw.Draw(image)
    for row, column in free:
        colour = {start: COLOURS["red"], goal: COLOURS["green"]}.get((row, column), (255, 255, 255))
        pen.rectangle((column * side, row * side, (column + 1) * side - 1, (row + 1) * side - 1), colour)
    file = draw.file()
    return Task(
        images={file: image},
        question=(
            f"{file} is a maze of square cells of {side} pixels: walls are black, the start is red, the goal "
            "green. How many steps has the shortest way, one step from a cell to one of its four neighbours?"
        ),
        cells=(
            opening(draw, file),
            cell(
                f"One pixel of each cell is enough: the middle, every {side} pixels.",
                """
                grid = pixels[$half :: $side, $half :: $side]
                free = grid.any(axis=-1)
                def place(rgb):
                    return tuple(np.argwhere((grid == rgb).all(axis=-1))[0].tolist())

                start, goal = place($red), place($green)
                print(free.shape, start, goal)
                """,
                half=side // 2,
                side=side,
                red=COLOURS["red"],
                green=COLOURS["green"],
            ),
            cell(
                "A breadth-first search from the start counts the steps.",
                """
                from collections import deque

                steps, queue = {start: 0}, deque([start])
                while queue:
                    y, x = queue.popleft()
                    for place in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                        if free[place] and place not in steps:
                            steps[place] = steps[y, x] + 1
                            queue.append(place)
                steps[goal]
                """,
            ),
        ),
        truth=_shortest(free, start, goal),
        answer=lambda value: f"The shortest way has {value} steps.",
    )


def _carved(draw: Draw, rows: int, columns: int, difficulty: int) -> set[tuple[int, int]]:
    """Free cells of a maze by depth-first search; harder ones have a few walls less, so more ways."""
    free, stack = {(1, 1)}, [(1, 1)]
    while stack:
        row, column = stack[-1]
        ways = [(row + dr, column + dc) for dr, dc in ((-2, 0), (2, 0), (0, -2), (0, 2))]
        ways = [(r, c) for r, c in ways if 0 < r < rows and 0 < c < columns and (r, c) not in free]
        if not ways:
            stack.pop()
            continue
        place = draw.of(ways)
        free |= {place, ((row + place[0]) // 2, (column + place[1]) // 2)}
        stack.append(place)
    for _ in range(2 * (difficulty - 1)):
        free.add((draw.between(1, rows - 2), draw.between(1, columns - 2)))
    return free


def _shortest(free: set[tuple[int, int]], start: tuple[int, int], goal: tuple[int, int]) -> int:
    far, queue = {start: 0}, deque([start])
    while goal not in far:
        row, column = queue.popleft()
        for place in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            if place in free and place not in far:
                far[place] = far[row, column] + 1
                queue.append(place)
    return far[goal]
