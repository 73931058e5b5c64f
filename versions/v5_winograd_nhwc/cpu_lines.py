"""Lines of neighbouring channels on the CPU: what happens to each value at the beginning and end of a method.

A line is a short array, so that the compiler sees loops from zero to a length over arrays of their own, and uses
vectors. A gradient is read through the route that the forward pass kept: a value goes where the route says, or nowhere.
"""

import numpy as np
from numba import njit

from versions.v5_winograd_nhwc.plan import NOWHERE

PLAIN, ROUTED, POOLED = 0, 1, 2  # what follows a convolution: nothing, ReLU, or ReLU and pooling


@njit
def clear(target):
    for c in range(target.size):
        target[c] = np.float32(0)


@njit
def copy(target, values):
    for c in range(values.size):
        target[c] = values[c]


@njit
def add(target, values):
    for c in range(values.size):
        target[c] += values[c]


@njit
def add2(target, a, b):
    for c in range(target.size):
        target[c] = a[c] + b[c]


@njit
def add3(target, a, b, d):
    for c in range(target.size):
        target[c] = a[c] + b[c] + d[c]


@njit
def copy_routed(target, values, route, wanted):
    # the values whose route is ``wanted``, zero elsewhere
    for c in range(values.size):
        value = values[c]  # loaded whatever the route says, so that the loop can use vectors
        target[c] = value if np.int32(route[c]) == wanted else np.float32(0)


@njit
def add_passed(target, values, route):
    # adds the values whose gradient goes anywhere
    for c in range(values.size):
        value = values[c]
        target[c] += value if np.int32(route[c]) != NOWHERE else np.float32(0)


@njit
def finish_relu(values, b, out, route):
    zero = np.float32(0)
    for c in range(out.size):
        value = values[c] + b[c]
        # A NaN fails this comparison and stays a NaN.
        out[c] = zero if value <= zero else value
        route[c] = np.uint8(np.int32(0) if value > zero else np.int32(NOWHERE))


@njit
def finish_pool(first, second, third, fourth, b, out, route):
    # The bias comes after the maximum: it is the same for the whole window.
    zero = np.float32(0)
    for c in range(out.size):
        best, where = first[c], np.int32(0)
        # Strictly larger: of equal values the first one gets the gradient. A NaN differs from itself; once it is the
        # best, no value compares larger.
        value = second[c]
        larger = value > best or value != value
        best, where = (value, np.int32(1)) if larger else (best, where)
        value = third[c]
        larger = value > best or value != value
        best, where = (value, np.int32(2)) if larger else (best, where)
        value = fourth[c]
        larger = value > best or value != value
        best, where = (value, np.int32(3)) if larger else (best, where)
        best += b[c]
        out[c] = zero if best <= zero else best
        route[c] = np.uint8(where if best > zero else np.int32(NOWHERE))
