"""Reading, packing and batching of training data; building of shard sets."""
