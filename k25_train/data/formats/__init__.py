"""Files on disk: shards, their index, tokenizers."""
