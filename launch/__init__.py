"""How training is started on a cluster. Imports no torch, so that a login node can refuse a bad job."""

# Foreign distributions have this name too; k25_train.startup.packages checks the mark first.
PROJECT = "k25_train"
