"""A gateway without a run: `python -m k25_train.rollout gateway`."""
