"""Errors that a user can cause and fix: the text names key or file, value, rule and remedy."""


class K25Error(Exception):
    """Base of the errors below; entry points print its text without a traceback."""

    is_shared = False
    """Whether every rank raises it, so that rank 0 alone prints it."""


class ConfigError(K25Error):
    """The configuration, or what it requires of this machine, breaks a rule."""


class DryRunError(K25Error):
    """The model of the configuration, built without memory for weights, breaks a rule."""


class DataError(K25Error):
    """A file of the training data is missing, truncated or not what the index says."""


class CheckpointError(K25Error):
    """A checkpoint is incomplete, does not fit the model, or cannot be written."""


class TrainingError(K25Error):
    """A step failed in a way that continuing would only make worse."""


class MachineError(K25Error):
    """This machine refused something that was asked of it: a file, memory, room, a package, a connection."""
