"""Rollouts in other processes, on this machine or others: one event loop each."""
