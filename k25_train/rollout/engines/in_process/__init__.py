"""transformers' Kimi K2.5 in this process, with slots that are filled again as soon as they are free."""
