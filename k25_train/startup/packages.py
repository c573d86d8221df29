"""Proof that the imported `parallel` and `launch` are this project's."""

from importlib import import_module

from k25_train.errors import ConfigError

PROJECT = "k25_train"
"""The mark that `parallel` and `launch` carry."""


def check_packages(*names: str) -> None:
    """Refuse to run with a foreign distribution that took one of our import names.

    Distributions called `parallel` and `launch` exist on PyPI: they would be imported instead of ours, or
    overwrite our files, without a warning.

    Raises:
        ConfigError: one of the packages does not carry this project's mark.
    """
    for name in names:
        package = import_module(name)
        if getattr(package, "PROJECT", None) != PROJECT:
            raise ConfigError(
                f"imported {name!r} from {package.__file__}, which is not k25-train's. "
                f"Uninstall the distribution it belongs to (pip uninstall {name}) or run from the checkout."
            )
