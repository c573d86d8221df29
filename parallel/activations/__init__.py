"""Activation memory: in which form what the backward pass needs waits for it."""
