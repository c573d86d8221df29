"""Responses of a policy: engines that generate them, the journal that keeps them."""
