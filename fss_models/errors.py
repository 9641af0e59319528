"""What a user can put right: one line that names the file, the class or the option."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in what was given; the commands print it as one line and end with code 2."""


class DataError(UserError):
    """An image, a mask, a list or a class that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint that cannot be read, or does not fit."""


class ConfigError(UserError):
    """A configuration that cannot be used."""
