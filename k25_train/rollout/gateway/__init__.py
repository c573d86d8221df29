"""Agents that speak an API act as the policy: their requests become turns, token by token."""
