"""By what a change of a file is noticed: one form for the index, and for whoever reads what it names."""

from collections.abc import Mapping
from typing import Any, NamedTuple

_ETAG = "etag "


class Version(NamedTuple):
    """A file as it was at some time."""

    num_bytes: int
    """Its size."""
    stamp: str
    """Its ETag or, where there is none, its time of change; empty if neither is known."""

    @property
    def etag(self) -> str:
        """In quotes, as requests have it; empty without one."""
        return f'"{self.stamp.removeprefix(_ETAG)}"' if self.stamp.startswith(_ETAG) else ""

    def is_same(self, other: "Version") -> bool:
        """Whether nothing that is known of both differs."""
        known = self.stamp and other.stamp
        return self.num_bytes == other.num_bytes and (not known or self.stamp == other.stamp)

    def __str__(self) -> str:
        return f"{self.num_bytes} bytes ({self.stamp or 'no stamp'})"


def version_of(info: Mapping[str, Any]) -> Version:
    """The version of a file by what fsspec's `info` says of it."""
    return Version(int(info["size"]), _stamp(info))


def _stamp(info: Mapping[str, Any]) -> str:
    for key in ("ETag", "etag"):
        if info.get(key):
            return f"{_ETAG}{info[key]}".replace('"', "")
    for key in ("mtime", "LastModified", "last_modified", "updated", "created"):
        if info.get(key) is not None:
            return f"time {info[key]}"
    return ""
