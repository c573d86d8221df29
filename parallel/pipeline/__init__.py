"""Layers over pipeline stages, and the order of their passes."""
