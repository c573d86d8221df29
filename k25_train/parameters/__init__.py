"""Every parameter: its names, shape and update rule; torch-free."""
