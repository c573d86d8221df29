"""Starts training on a cluster. Imports no torch, so that a login node can reject a bad job."""

# Other distributions use this package name too; k25_train.startup.packages checks for this mark first.
PROJECT = "k25_train"
