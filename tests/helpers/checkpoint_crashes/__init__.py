"""Crashes while checkpoints are saved, committed and pruned: jobs that do nothing else, what they leave."""
