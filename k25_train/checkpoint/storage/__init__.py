"""What checkpoints lie on: file systems with a rename, and object stores without one."""
