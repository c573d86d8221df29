"""Services that keep a run's metrics, next to its folder: Weights & Biases and MLflow, where asked for."""
