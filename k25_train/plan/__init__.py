"""What a configuration will need, free of torch: so far the parameters it has."""
