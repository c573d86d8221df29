"""How a pod says what became of its ranks: exit statuses that the manifest's failure policies tell apart."""

from k25_train.entry import FAULT, REFUSED

FINISHED = 0
"""The last step is trained and saved."""
FAILED = FAULT
"""A rank failed or was killed, or not all pods came in time: start again, a limited number of times."""
IMPOSSIBLE = REFUSED
"""Configuration or pod are wrong, named before any rank was started: starting again is no use."""
UNFIT = 3
"""Preflight failed; the first pod's log names the nodes."""
STOPPED = 4
"""The pod was told to end before the last step, and its ranks have saved: start again."""
NAMED = (IMPOSSIBLE, UNFIT, STOPPED)
"""Statuses that the manifest has rules for."""
