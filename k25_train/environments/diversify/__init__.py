"""The same task under other system prompts, names of tools, formats and languages."""
