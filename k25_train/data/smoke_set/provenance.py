"""Where the smoke set comes from: sources, licences, and checksums of the files."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from k25_train.data.formats.dataset import SourceInfo
from k25_train.data.smoke_set.sources.archive import Archive
from k25_train.data.smoke_set.sources.base import Sample, Source

LICENCES_FILE = "LICENSES.md"
CHECKSUMS_FILE = "SHA256SUMS"
REGISTRY = "PyPI"


def source_info(source: Source, samples: Sequence[Sample]) -> SourceInfo:
    """What the manifest says of a source."""
    return SourceInfo(
        name=source.name,
        version=", ".join(f"{archive.package} {archive.version}" for archive in source.archives),
        registry=REGISTRY,
        licence=source.licence,
        files=len(source.archives),
        samples=sum(sample.source == source.name for sample in samples),
    )


class Licensed(Protocol):
    """A source, as far as licences are concerned."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def archives(self) -> Sequence[Archive]:
        """The packages it reads."""

    @property
    def licence(self) -> str:
        """SPDX expression."""

    @property
    def attribution(self) -> str:
        """Who made it."""


def write_licences(
    path: Path,
    sources: Sequence[Licensed],
    title: str = "# Licences of this shard set",
    note: str = "Each sample's own licence is in its `.json` member, too.",
) -> None:
    """Write the licence and the packages of each source as Markdown."""
    lines = [title, "", note, ""]
    for source in sources:
        lines += [
            f"## {source.name}",
            "",
            f"Licence: `{source.licence}`",
            "",
            source.attribution,
            "",
            "Packages:",
        ]
        lines += [f"- {a.package} {a.version}: `{a.file_name}`, sha256 `{a.sha256}`" for a in source.archives]
        lines.append("")
    path.write_text("\n".join(lines), encoding="utf-8")


def write_checksums(folder: Path) -> None:
    """Write a checksum per file in the format of `sha256sum`: `sha256sum -c SHA256SUMS` checks the folder."""
    lines = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n" for p in sorted(folder.iterdir())]
    (folder / CHECKSUMS_FILE).write_text("".join(lines), encoding="utf-8")
