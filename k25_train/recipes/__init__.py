"""Whole recipes of the report: chains of stages, and experiments on them, each a command."""
