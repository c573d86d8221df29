"""Instructions that can be verified: added to a prompt, and checked in the answer."""
