"""A corpus of documents in one file, and tools that search it."""
