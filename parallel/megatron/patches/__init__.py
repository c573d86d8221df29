"""What changes megatron-core, guarded by its version."""
