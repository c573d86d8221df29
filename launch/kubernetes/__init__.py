"""Training on Kubernetes: a JobSet from the same configuration and cluster file as everywhere else."""
