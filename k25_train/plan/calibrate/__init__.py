"""Fits the few constants of `cluster.rates.calibration` to short runs of a machine."""
