"""Families of generated tasks that ship (`registry.py` names them)."""
