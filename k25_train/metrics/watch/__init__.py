"""`k25-metrics watch`: what becomes of a run, from its rows alone."""
