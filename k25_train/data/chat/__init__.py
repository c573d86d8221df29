"""Conversations for fine-tuning: what they may hold, Kimi's template, and their tokens."""
