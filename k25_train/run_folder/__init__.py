"""The run folder: who may write to it, and whether all ranks see the same one."""
