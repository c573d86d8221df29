"""Where each format says what it is."""

from k25_train.config.sources import SourceFormat
from k25_train.data.formats.source_format import FormatSpec


def spec_of(format: SourceFormat) -> FormatSpec:
    """The format's own; imported when it is asked for, since some need large libraries."""
    match format:
        case SourceFormat.shards:
            from k25_train.data.formats.shards import SHARDS

            return SHARDS
        case SourceFormat.indexed:
            from k25_train.data.formats.indexed import INDEXED

            return INDEXED
        case SourceFormat.chat:
            from k25_train.data.chat.format import CHAT

            return CHAT
        case SourceFormat.webdataset:
            from k25_train.data.tar.source import WEBDATASET

            return WEBDATASET
        case SourceFormat.energon:
            from k25_train.data.tar.source import ENERGON

            return ENERGON
