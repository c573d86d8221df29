"""Preparations before megatron-core is first imported."""
