"""Reinforcement learning: tasks, engines, judges and the trainer put together."""
