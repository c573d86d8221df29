"""Checkpoints on the nodes' own disks: they survive the job, but not the node."""
