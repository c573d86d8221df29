"""The chat set: conversations, code and tool use to fine-tune the shrunk model on, and its vocabulary."""
