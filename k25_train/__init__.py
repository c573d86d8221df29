"""What is trained: model, data, optimizer, checkpoints and the training loop of a Kimi-K2.5-class model."""

PROJECT = "k25_train"
