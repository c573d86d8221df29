"""One rule a file, each a pure function of structures, without torch: workers import nothing else."""
