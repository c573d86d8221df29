"""Whole matrices out of flat shards: who works on which, and the exchange that brings them there and back."""
