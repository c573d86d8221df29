"""Reads all of a source again and names what is not as it should be."""
