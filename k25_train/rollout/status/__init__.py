"""What a run's rollouts are doing, for a browser and for Prometheus."""
