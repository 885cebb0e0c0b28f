"""What the package raises and warns with on purpose."""


class IksError(Exception):
    """Root of every exception that iks_plugin raises on purpose."""


class OptionError(IksError, ValueError):
    """An option has a wrong name, type or value."""


class IksWarning(UserWarning):
    """Something works, but probably not as its user meant it."""
