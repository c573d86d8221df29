"""What a run has rolled out, for people."""
