"""What is trained: model, data, optimizer, checkpoints and the training loop of a Kimi-K2.5-class model."""

PROJECT = "k25_train"

# At once, since any other import from a foreign `parallel` would fail with less to say.
from k25_train.packages import check_packages  # noqa: E402

check_packages("parallel")
