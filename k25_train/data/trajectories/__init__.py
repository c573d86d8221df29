"""What a policy has generated, as training data: a file per step, packed, padded and dealt like any batch."""
