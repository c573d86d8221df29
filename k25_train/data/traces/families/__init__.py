"""What is asked about images: one module for each kind of skill, families by name in `registry`."""
