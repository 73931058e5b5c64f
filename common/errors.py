"""The one exception that means "the request was wrong", not "the program is".

The command line turns it into one line on standard error and exit code 2, so its message has to stand alone: it
names the wrong value and the valid ones.
"""


class UsageError(ValueError):
    """A request that cannot be met as asked; the message is complete without a traceback."""
