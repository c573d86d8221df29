"""What is trained: model, data, optimizer, checkpoints and the training loop of a Kimi-K2.5-class model."""

# At once, since any other import from a foreign `parallel` would fail with less to say.
from k25_train.startup.packages import check_packages

check_packages("parallel")
