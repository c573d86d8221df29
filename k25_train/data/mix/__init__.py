"""Which samples make up which sequence of which step."""
