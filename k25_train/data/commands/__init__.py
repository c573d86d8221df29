"""Commands of `k25-data`, a module each: `add(commands)` declares one, `run` hands its options on."""
