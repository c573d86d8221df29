"""Starts an inference engine on a checkpoint: vLLM in its own environment, or the in-process one alone."""
