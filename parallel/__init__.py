"""How training is spread over ranks. Knows tensors and process groups, nothing of Kimi K2.5."""

# Foreign distributions have this name too; k25_train.startup.packages checks the mark first.
PROJECT = "k25_train"
