"""Streams that are numbers, and the current one."""

import itertools

from . import cublas as cublas
from . import runtime as runtime

_numbers = itertools.count(0x700000, 16)
_current = []


class Stream:
    def __init__(self, null=False, non_blocking=False):
        self.ptr = 0 if null else next(_numbers)

    def __enter__(self):
        _current.append(self)
        return self

    def __exit__(self, *error):
        _current.pop()

    def synchronize(self):
        pass


def get_current_stream():
    return _current[-1] if _current else Stream(null=True)
