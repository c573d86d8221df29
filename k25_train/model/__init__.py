"""The language model, the vision tower, and the two together."""
