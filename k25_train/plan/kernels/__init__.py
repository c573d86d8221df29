"""What a device computes in a step, kernel by kernel, and how long each takes; torch-free."""
