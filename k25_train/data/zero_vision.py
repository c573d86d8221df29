"""Zero vision (`data.zero_vision`): no source has an image or a video, and nothing could decode one.

Three things hold, so that "no pixel was read" is more than a promise. An index with media is refused by name,
when it is made and when it is opened, which is before anything is trained. Sources have no decoder but
`NoPixels`. And what is decoded is counted where it is decoded (`decode/media.py`), summed over all ranks and
written into each row as `pixels_read`.
"""

from collections.abc import Sequence
from typing import NoReturn

from k25_train.data.decode.media import MediaPatches, MediaReader, Wanted
from k25_train.data.source_items import Items
from k25_train.errors import DataError


class NoPixels(MediaReader):
    """In the place of a source's decoder; whoever asks it for pixels gets an error."""

    def __init__(self, source: str) -> None:
        """`source`: its key in `data.sources`. There is neither reader nor decoder."""
        self._source = source

    def load_all(self, wanted: Sequence[Wanted]) -> list[MediaPatches]:
        """Raises DataError."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise DataError(
            f"data.sources.{self._source}: pixels were asked for, but data.zero_vision is true and there is "
            "no decoder. This is an error of the program."
        )


def check_no_media(name: str, place: str, items: Items) -> None:
    """Raises DataError, naming source, file and sample, if any item of a source has an image or a video."""
    if not items.columns.has_media:
        return
    num_items = items.columns.num_items
    records = (items.record(item) for item in range(num_items))
    first = next((record for record in records if record.media), None)
    where = f"{place}/{first.shard}, sample {first.key}" if first is not None else place
    kind = {"image": "an image", "video": "a video"}[first.media[0].type] if first else "media"
    raise DataError(
        f"data.sources.{name}: {where} has {kind}, but data.zero_vision is true: what is trained on then has "
        f"text alone. Take such samples out, leave the source out (~data.sources.{name}), or set "
        "data.zero_vision=false."
    )
