"""Errors that a user can cause and mend: the text names key or file, value, rule and remedy."""


class K25Error(Exception):
    """Base of the errors below; entry points print its text without a traceback."""


class ConfigError(K25Error):
    """The configuration, or what it demands of this machine, breaks a rule."""


class DryRunError(K25Error):
    """What the configuration leads to was built, without memory, and breaks a rule."""


class DataError(K25Error):
    """A file of the training data is absent, cut short or not what the index says."""


class CheckpointError(K25Error):
    """A checkpoint is incomplete, does not fit the model, or cannot be written."""


class TrainingError(K25Error):
    """A step went wrong in a way that going on would only make worse."""
