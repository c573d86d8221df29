"""Numbers that NVIDIA's driver writes to the kernel log when a GPU (XID) or an NVSwitch (SXid) has an error.

Source: NVIDIA's XID catalogue for Ampere and later GPUs (docs.nvidia.com/deploy/xid-errors) with its
immediate actions, and for NVSwitches the fabric manager's user guide, appendix D. Verdicts follow from them:
an error that needs a reset, a reboot or a repair fails; one that the driver dealt with, or whose cause is not
known, warns; one that a program caused says nothing about the node.
"""

RESET = {
    46: "GPU stopped processing",
    48: "memory error that ECC could not correct",
    62: "internal micro-controller halt",
    64: "memory remapping failed",
    74: "NVLink error",
    95: "uncontained memory error",
    109: "context switch timeout",
    110: "security fault",
    119: "GSP does not answer",
    120: "GSP error",
    136: "NVLink training failed",
    140: "memory error that was not recovered",
    143: "GPU initialization error",
    155: "NVLink error defined by software",
    156: "resource retirement event",
    158: "GPU fatal timeout",
    169: "internal micro-controller halt",
    171: "uncorrectable DRAM error",
    172: "uncorrectable SRAM error",
}
"""XID -> meaning, where the GPU must be reset."""
REBOOT = {
    54: "auxiliary power is not connected",
    78: "vGPU start error",
    79: "GPU has fallen off the bus",
    142: "encoder error",
    151: "key rotation error",
    157: "resource retirement failed",
    167: "fatal PCIe timeout",
    168: "errors in write-protected memory",
}
"""XID -> meaning, where the node must be rebooted, or someone has to look after it."""
WARNED = {
    38: "driver firmware error",
    63: "memory row remapped, effective after the next reset",
    92: "high rate of corrected memory errors",
    93: "InfoROM is worn",
    94: "contained memory error",
    121: "error between CPU and GPU",
    137: "NVLink privilege error",
    159: "coherent hub interface error",
    160: "channel retired",
    161: "channel retirement failed",
    163: "power smoothing disengaged",
    164: "power smoothing is nearly worn out",
    165: "power smoothing is worn out",
}
"""XID -> meaning, where the driver dealt with it; it may come back, or more may follow."""
NVLINK5 = range(144, 151)
"""XIDs of NVLink on Blackwell GPUs; their texts say whether they are fatal."""
RECOVERY_ACTION = 154
"""XID with which the driver says what is to be done, as the last words in parentheses."""
PROGRAMS = frozenset(
    (
        8, 11, 13, 25, 31, 32, 37, *range(39, 46), 60, 66, 67, *range(68, 73), *range(75, 78), 80,
        *range(82, 87), 88, 89, *range(96, 108), *range(126, 136), 139, 141, 152, 153, 162,
    )
)  # fmt: skip
"""XIDs that programs cause, or that only follow another one."""

ALWAYS_FATAL = frozenset((12020, 22003, 22011, *range(23001, 23018)))
"""SXids that are fatal to the whole node, whatever their text says."""
HARMLESS_SXIDS = frozenset((10005, 22013))
"""SXids of the end of a thermal event, and of links that are being trained, as when a node starts."""


def meaning_of(xid: int) -> str:
    """What an XID means; empty if the catalogue does not say."""
    if xid in NVLINK5:
        return "NVLink error"
    return RESET.get(xid) or REBOOT.get(xid) or WARNED.get(xid) or ""
