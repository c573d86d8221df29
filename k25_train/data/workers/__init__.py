"""Processes of each rank that read, tokenise and decode what its reading process has planned."""
