"""Tar shards read in place, whoever wrote them: `webdataset` and `energon`."""
