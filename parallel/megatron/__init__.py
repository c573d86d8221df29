"""The one seam to megatron-core: see README.md in this folder."""
