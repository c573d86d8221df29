"""What a preparation tells whoever watches it."""

from typing import Protocol

from k25_train.data.prepare.skips import Skips


class View(Protocol):
    """Shows how it goes on."""

    def start(self, stage: str, total: int, done: int) -> None:
        """A stage begins, of which some bytes were done before."""

    def show(self, done: int, skips: Skips, tokens: int) -> None:
        """Bytes done of the stage, and tokens of units that are being made."""

    def stop(self) -> None:
        """The stage is over."""
