"""Work handed to threads in small pieces as they become free.

Numba gives each thread an equal share beforehand. Where one core is slower, or busy with something else, the others
then wait for it. Here every thread takes the next piece when it has finished one::

    counter[0] = 0
    for _ in prange(threads):
        piece = take(counter)
        while piece < pieces:
            ...
            piece = take(counter)

Which thread computes a piece differs from run to run. Results do not, if each value is computed within one piece.
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic


@intrinsic
def take(typing_context, counter):
    """The value of ``counter`` (1,) int64, which is incremented in the same atomic step."""

    def generate(context, builder, signature, arguments):
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        one = ir.Constant(ir.IntType(64), 1)
        return builder.atomic_rmw("add", array.data, one, "monotonic")

    return types.int64(counter), generate
