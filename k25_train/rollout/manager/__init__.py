"""Runs 100,000 rollouts on an event loop: admits them, watches them, ends them, and says how they are."""
