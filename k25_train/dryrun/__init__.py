"""The dry run: every distinct rank of a job, built from the real modules without memory, and checked."""
