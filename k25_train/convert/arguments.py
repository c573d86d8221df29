"""Arguments that the commands of k25-convert share."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

from k25_train.config.basics import is_url


def positive[Number: (int, float)](kind: type[Number]) -> Callable[[str], Number]:
    """Reads a positive number that is finite."""

    def number(text: str) -> Number:
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text}: must be positive")
        return value

    return number


def folder(text: str) -> Path:
    """Reads a folder of a file system."""
    if is_url(text):
        raise argparse.ArgumentTypeError(f"{text}: must be a folder: object stores are copied from and to")
    return Path(text)
