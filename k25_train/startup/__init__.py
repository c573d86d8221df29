"""What comes before megatron-core's first import."""
