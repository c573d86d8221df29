"""What vLLM's workers import; this folder alone is on their path, so that they see none of our packages."""
