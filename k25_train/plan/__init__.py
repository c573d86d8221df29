"""What a configuration needs and how long it takes, counted without torch."""
