"""Checks of nodes and fabric before a job costs anything; `python -m launch.preflight`."""
