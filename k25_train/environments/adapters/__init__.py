"""Environments of other systems as sources of tasks, each by the wire it speaks."""
