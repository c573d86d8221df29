"""Commands of `k25-checkpoint`, a module each: `add(commands)` declares one, `run` does what it is for."""
