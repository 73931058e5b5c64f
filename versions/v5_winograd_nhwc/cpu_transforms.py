"""The one-dimensional transforms of Winograd's algorithm on the CPU, along the columns and then the rows of a tile.

They work in place in a scratch array (6,6,LANES) of constant layout: the compiler only uses vectors without further
checks where distances in memory are constant.
"""

from numba import njit

from versions.v5_winograd_nhwc.plan import LANES
from versions.v5_winograd_nhwc.winograd import A_T, B_T, G_WHOLE, OUTPUTS, SCALE, TAPS, TILE, combinations, transposed

# Products and sums may be contracted; NaN and infinity keep their meaning.
FAST = {"contract", "nsz"}
B0, B1, B2, B3, B4, B5 = combinations(B_T, njit(fastmath=FAST))
A0, A1, A2, A3 = combinations(A_T, njit(fastmath=FAST))
Z0, Z1, Z2, Z3, Z4, Z5 = combinations(transposed(A_T), njit(fastmath=FAST))
G0, G1, G2, G3, G4, G5 = combinations(G_WHOLE, njit(fastmath=FAST))
D0, D1, D2 = combinations(transposed(G_WHOLE), njit(fastmath=FAST))


@njit(fastmath=FAST)
def transform_input(s):
    # s (6,6,LANES) flat: d -> B^T d B, in place
    for j in range(TILE):
        for c in range(LANES):
            i = j * LANES + c
            d = (s[i], s[i + 6 * LANES], s[i + 12 * LANES], s[i + 18 * LANES], s[i + 24 * LANES], s[i + 30 * LANES])
            s[i] = B0(d)
            s[i + 6 * LANES] = B1(d)
            s[i + 12 * LANES] = B2(d)
            s[i + 18 * LANES] = B3(d)
            s[i + 24 * LANES] = B4(d)
            s[i + 30 * LANES] = B5(d)
    for j in range(TILE):
        for c in range(LANES):
            i = j * (6 * LANES) + c
            d = (s[i], s[i + LANES], s[i + 2 * LANES], s[i + 3 * LANES], s[i + 4 * LANES], s[i + 5 * LANES])
            s[i] = B0(d)
            s[i + LANES] = B1(d)
            s[i + 2 * LANES] = B2(d)
            s[i + 3 * LANES] = B3(d)
            s[i + 4 * LANES] = B4(d)
            s[i + 5 * LANES] = B5(d)


@njit(fastmath=FAST)
def transform_output(s):
    # s (6,6,LANES) flat: m -> A^T m A, in place; the result is in the first four of each of the first four rows
    for j in range(TILE):
        for c in range(LANES):
            i = j * LANES + c
            d = (s[i], s[i + 6 * LANES], s[i + 12 * LANES], s[i + 18 * LANES], s[i + 24 * LANES], s[i + 30 * LANES])
            s[i] = A0(d)
            s[i + 6 * LANES] = A1(d)
            s[i + 12 * LANES] = A2(d)
            s[i + 18 * LANES] = A3(d)
    for j in range(OUTPUTS):
        for c in range(LANES):
            i = j * (6 * LANES) + c
            d = (s[i], s[i + LANES], s[i + 2 * LANES], s[i + 3 * LANES], s[i + 4 * LANES], s[i + 5 * LANES])
            s[i] = A0(d)
            s[i + LANES] = A1(d)
            s[i + 2 * LANES] = A2(d)
            s[i + 3 * LANES] = A3(d)


@njit(fastmath=FAST)
def transform_gradient(s):
    # s (6,6,LANES) flat with a 4x4 tile in its first rows and columns: dy -> A dy A^T, in place
    for j in range(OUTPUTS):
        for c in range(LANES):
            i = j * LANES + c
            d = (s[i], s[i + 6 * LANES], s[i + 12 * LANES], s[i + 18 * LANES])
            s[i] = Z0(d)
            s[i + 6 * LANES] = Z1(d)
            s[i + 12 * LANES] = Z2(d)
            s[i + 18 * LANES] = Z3(d)
            s[i + 24 * LANES] = Z4(d)
            s[i + 30 * LANES] = Z5(d)
    for j in range(TILE):
        for c in range(LANES):
            i = j * (6 * LANES) + c
            d = (s[i], s[i + LANES], s[i + 2 * LANES], s[i + 3 * LANES])
            s[i] = Z0(d)
            s[i + LANES] = Z1(d)
            s[i + 2 * LANES] = Z2(d)
            s[i + 3 * LANES] = Z3(d)
            s[i + 4 * LANES] = Z4(d)
            s[i + 5 * LANES] = Z5(d)


@njit(fastmath=FAST)
def transform_filter(s):
    # s with a 3x3 filter in its first rows and columns: g -> G g G^T
    for j in range(TAPS):
        for c in range(LANES):
            i = j * LANES + c
            d = (s[i], s[i + 6 * LANES], s[i + 12 * LANES])
            s[i] = G0(d)
            s[i + 6 * LANES] = G1(d)
            s[i + 12 * LANES] = G2(d)
            s[i + 18 * LANES] = G3(d)
            s[i + 24 * LANES] = G4(d)
            s[i + 30 * LANES] = G5(d)
    for j in range(TILE):
        for c in range(LANES):
            i = j * (6 * LANES) + c
            d = (s[i], s[i + LANES], s[i + 2 * LANES])
            s[i] = SCALE * G0(d)
            s[i + LANES] = SCALE * G1(d)
            s[i + 2 * LANES] = SCALE * G2(d)
            s[i + 3 * LANES] = SCALE * G3(d)
            s[i + 4 * LANES] = SCALE * G4(d)
            s[i + 5 * LANES] = SCALE * G5(d)


@njit(fastmath=FAST)
def transform_filter_gradient(s):
    # s -> G^T s G, in the first three of each of the first three rows
    for j in range(TILE):
        for c in range(LANES):
            i = j * LANES + c
            d = (s[i], s[i + 6 * LANES], s[i + 12 * LANES], s[i + 18 * LANES], s[i + 24 * LANES], s[i + 30 * LANES])
            s[i] = D0(d)
            s[i + 6 * LANES] = D1(d)
            s[i + 12 * LANES] = D2(d)
    for j in range(TAPS):
        for c in range(LANES):
            i = j * (6 * LANES) + c
            d = (s[i], s[i + LANES], s[i + 2 * LANES], s[i + 3 * LANES], s[i + 4 * LANES], s[i + 5 * LANES])
            s[i] = SCALE * D0(d)
            s[i + LANES] = SCALE * D1(d)
            s[i + 2 * LANES] = SCALE * D2(d)
