"""The exceptions whose message is all that a user needs: it stands alone, without a traceback.

The command line turns either into one line on standard error. A message names the wrong value and the valid ones, or
what happened and what is left.
"""


class UsageError(ValueError):
    """A request that cannot be met as asked; exit code 2."""


class RunError(RuntimeError):
    """Work that was begun and cannot be finished, by no fault of the request; exit code 1."""


def check_number(name: str, value: int | None, least: int) -> None:
    """Raise UsageError for a number that is too small; None is a default yet to come."""
    if value is not None and value < least:
        raise UsageError(f"{name} {value}: must {f'be at least {least}' if least else 'not be negative'}")
