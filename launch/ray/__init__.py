"""Reinforcement learning whose rollouts are actors of a Ray cluster that lives as long as the run does."""
