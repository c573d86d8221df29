"""What becomes of a run, read from its folder and SLURM's queue: nothing is written and no rank is asked."""
