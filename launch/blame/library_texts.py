"""What texts of gloo, NCCL and CUDA say about who is at fault: the peer of a connection, or a broken device.

The libraries have no numbers for it. Each pattern is a format that their binaries contain.
"""

import re
from collections.abc import Sequence

_PEERS: Sequence[re.Pattern[str]] = (
    # gloo: "Connection closed by peer [10.0.0.2]:25063", "Read error [10.0.0.2]:25063: …".
    re.compile(
        r"(?:Connection closed by peer|Connection reset by peer|(?:Read|Write) error) \[([^\]\s]+)\]:\d+"
    ),
    # NCCL: src/transport/net_ib, src/misc/socket; "10.0.0.2<54862>", "node7<54862>", "fe80::1%eth0<54862>".
    re.compile(r"Got completion from peer ([^\s<]+)<\d+>"),
    re.compile(r"Connection closed by remote peer ([^\s<]+)<\d+>"),
    re.compile(r"connect to ([^\s<]+)<\d+> (?:failed|returned)"),
    re.compile(r"PollConnect to ([^\s<]+)<\d+> failed"),
)
_BROKEN_DEVICE = re.compile(
    # cudaGetErrorString of what no program can cause, and the driver's words for a device that is gone.
    r"uncorrectable (?:ECC|NVLink) error|hardware stack error|[Gg][Pp][Uu] (?:is lost|has fallen off the bus)"
    r"|peer GPU memory over nvlink or a hardware error"
)


def peer_of(text: str) -> str:
    """Address or name of the other side of a connection that failed; empty if none is named."""
    for pattern in _PEERS:
        if match := pattern.search(text):
            return match[1].removeprefix("::ffff:").partition("%")[0]
    return ""


def says_device_is_broken(text: str) -> bool:
    """Whether the driver says that a device does not work, whatever the program does."""
    return _BROKEN_DEVICE.search(text) is not None
