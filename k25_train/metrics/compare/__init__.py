"""`k25-metrics compare`: several runs next to each other."""
