"""What occupies a device or a host."""
