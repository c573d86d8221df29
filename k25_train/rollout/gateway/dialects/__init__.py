"""APIs that agents speak, as pure functions."""
