"""Zero-vision traces: questions about images that the model never sees, answered by code that was run."""
