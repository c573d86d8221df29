"""Whole matrices from flat shards, for Muon: which rank updates which, and the exchange with these owners."""
