"""From hydra to a typed, checked configuration."""
