"""The exceptions whose message is all that a user needs: it stands alone, without a traceback.

The command line turns either into one line on standard error. A message names the wrong value and the valid ones, or
what happened and what is left.
"""


class UsageError(ValueError):
    """A request that cannot be met as asked; exit code 2."""


class RunError(RuntimeError):
    """Work that was begun and cannot be finished, by no fault of the request; exit code 1."""
