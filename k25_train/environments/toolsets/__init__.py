"""What a policy may call: named sets of tools (README)."""
