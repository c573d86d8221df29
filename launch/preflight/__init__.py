"""Checks of the nodes and the fabric, made before a job costs anything; `python -m launch.preflight`."""
