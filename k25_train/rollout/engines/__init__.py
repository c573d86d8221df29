"""Engines behind one protocol; nothing else imports transformers' generation or an engine's client."""
