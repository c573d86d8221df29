"""What is to be solved, and what came of it: tasks, verdicts, and a sandbox for code of a model."""
