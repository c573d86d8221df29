"""From one layout to another: which stored range goes where, and who reads it. Pure plans, on arrays."""
