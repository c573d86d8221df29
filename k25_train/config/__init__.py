"""Configuration, free of torch: schema, checks, and the way from hydra to typed objects."""
