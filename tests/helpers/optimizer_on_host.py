"""Where the optimizer's state rests."""

ON_HOST = "optim.offload=cpu"
ON_DEVICE = "optim.offload=none"
