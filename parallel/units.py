"""Units of bytes. Standard library only."""

MIB = 2**20
GIB = 2**30
"""What memory is measured in: sizes of devices' and hosts' memory as operating systems report them."""
GB = 10**9
"""What data sheets are written in: sizes of GPUs, and all rates."""
