"""Builds and verifies the smoke experiment's shard set."""
