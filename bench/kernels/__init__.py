"""The GPU kernels as the compilers see them: which are launched, and what they need."""
