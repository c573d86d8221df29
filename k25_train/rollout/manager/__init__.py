"""Many rollouts at once: which begin when, how long each may take, and where each of them is."""
