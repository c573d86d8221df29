"""From bytes to patches."""
