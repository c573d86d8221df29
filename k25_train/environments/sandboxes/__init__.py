"""Sandboxes that live as long as a rollout: one interface, several machines behind it."""
