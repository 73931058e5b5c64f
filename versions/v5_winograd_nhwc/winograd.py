"""Winograd's algorithm F(4x4, 3x3): its three matrices from the interpolation points, and its error bound.

A filter and a piece of a line are polynomials. Their product is known from its values at enough points, and the values
of a product are products of values: six for four outputs of three taps, where the direct sum has twelve. Along both
axes that is 36 instead of 144 (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2016):

    Y = A^T [ (G g G^T) * (B^T d B) ] A        g (3,3) filter, d (6,6) tile of the input, Y (4,4) tile of the output

The point at infinity stands for the leading coefficient. The gradient to the filter is the transpose with respect to g:

    dg = G^T [ (B^T d B) * (A dY A^T) ] G

Everything here is exact; the kernels round the matrices to float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from math import lcm, prod, sqrt
from typing import Any

import numpy as np

POINTS = (0, 1, -1, 2, -2)  # and infinity
OUTPUTS = 4  # along one axis of a tile
TAPS = 3
TILE = OUTPUTS + TAPS - 1  # inputs along one axis of a tile, and products along it
PRODUCTS = TILE * TILE

Matrix = tuple[tuple[Fraction, ...], ...]


def matrices(points: Sequence[int], outputs: int = OUTPUTS) -> tuple[Matrix, Matrix, Matrix]:
    """A^T (outputs, n), G (n, 3) and B^T (n, n) for these n - 1 different points and infinity.

    Raises ValueError unless outputs + 3 - 1 products are enough, or if two points are equal.
    """
    n = outputs + TAPS - 1
    if len(points) != n - 1 or len(set(points)) != n - 1:
        raise ValueError(f"{outputs} outputs take {n - 1} different points besides infinity, not {points}")
    powers = [[Fraction(point) ** i for i in range(n)] for point in points]
    scales = [prod((Fraction(a - b) for b in points if b != a), start=Fraction(1)) for a in points]
    last = (Fraction(0),) * (outputs - 1) + (Fraction(1),)
    a_t = tuple((*(row[i] for row in powers), last[i]) for i in range(outputs))
    g = tuple(tuple(row[i] / scale for i in range(TAPS)) for row, scale in zip(powers, scales, strict=True))
    g += ((Fraction(0), Fraction(0), Fraction(1)),)
    b_t = (*(_with_roots([b for b in points if b != a], n) for a in points), _with_roots(points, n))
    return a_t, g, b_t


def _with_roots(roots: Sequence[int], length: int) -> tuple[Fraction, ...]:
    """Coefficients, the constant first and padded with zeros, of the polynomial with these roots."""
    coefficients = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *coefficients]
        coefficients = [s - root * c for s, c in zip(shifted, [*coefficients, Fraction(0)], strict=True)]
    return tuple(coefficients) + (Fraction(0),) * (length - len(coefficients))


A_T, G, B_T = matrices(POINTS)

DENOMINATOR = lcm(*(value.denominator for row in G for value in row))
G_WHOLE = tuple(tuple(value * DENOMINATOR for value in row) for row in G)
"""G in whole numbers: a filter is transformed with these, and then divided by ``DENOMINATOR`` squared.

Thirds are not exact in float32, and their errors would not cancel out where the sums do.
"""
SCALE = np.float32(1 / DENOMINATOR**2)


def transposed(matrix: Matrix) -> Matrix:
    """Rows and columns exchanged."""
    return tuple(zip(*matrix, strict=True))


def combinations(matrix: Matrix, jit: Callable[[Callable], Any]) -> tuple[Any, ...]:
    """For each row, a function that adds the values of a tuple or array with the row's coefficients.

    Zeros cost nothing.
    ``jit`` compiles it, for the CPU or for the GPU.
    """
    made = []
    for row in matrix:
        terms = [(place, np.float32(float(value))) for place, value in enumerate(row) if value]
        made.append(_SUMS[len(terms)](jit, *[part for term in terms for part in term]))
    return tuple(made)


def _sum1(jit, i, a):
    return jit(lambda d: a * d[i])


def _sum2(jit, i, a, j, b):
    return jit(lambda d: a * d[i] + b * d[j])


def _sum3(jit, i, a, j, b, k, c):
    return jit(lambda d: a * d[i] + b * d[j] + c * d[k])


def _sum4(jit, i, a, j, b, k, c, m, e):
    return jit(lambda d: (a * d[i] + b * d[j]) + (c * d[k] + e * d[m]))


def _sum5(jit, i, a, j, b, k, c, m, e, n, f):
    return jit(lambda d: (a * d[i] + b * d[j]) + (c * d[k] + e * d[m]) + f * d[n])


def _sum6(jit, i, a, j, b, k, c, m, e, n, f, o, g):
    return jit(lambda d: (a * d[i] + b * d[j]) + (c * d[k] + e * d[m]) + (f * d[n] + g * d[o]))


_SUMS = {1: _sum1, 2: _sum2, 3: _sum3, 4: _sum4, 5: _sum5, 6: _sum6}


def error_factor(a_t: Matrix = A_T, g: Matrix = G, b_t: Matrix = B_T) -> float:
    """How many times the rounding error of a direct sum that of the algorithm is, forward or backward, at its worst.

    An error of one rounding in a transformed value reaches an output multiplied by the matrices' coefficients
    (Barabasz, Anderson, Soodhalter and Gregg, "Error Analysis and Improving the Accuracy of Winograd Convolution for
    Deep Neural Networks", 2020). They bound it with the matrices' norms, for the worst case of signs. The tolerance for
    a direct sum takes errors to be independent, so that they add as squares, and so does this factor: for operands of
    equal magnitude, product m of an output i has the variance A_im^2 |G_m|^2 |B_m|^2 along one axis, where a direct sum
    has three terms of variance 1. Two axes multiply. For the filter gradient the roles of A and G are exchanged, and a
    direct sum has as many terms as a tile has outputs.
    """

    def squares(row: Sequence[Fraction]) -> Fraction:
        return sum((value * value for value in row), start=Fraction(0))

    def worst(outer: Matrix, *inner: Matrix) -> Fraction:
        weights = [prod((squares(matrix[m]) for matrix in inner), start=Fraction(1)) for m in range(len(b_t))]
        return max(sum((v * v * w for v, w in zip(row, weights, strict=True)), start=Fraction(0)) for row in outer)

    forward = worst(a_t, g, b_t) / TAPS
    backward_filter = worst(transposed(g), transposed(a_t), b_t) / len(a_t)
    return sqrt(max(forward, backward_filter)) ** 2
