"""The versions that CuPy tells; a test may choose them."""

import os


def driverGetVersion():
    return int(os.environ.get("STUB_DRIVER_VERSION", "13000"))


def runtimeGetVersion():
    return int(os.environ.get("STUB_RUNTIME_VERSION", "12090"))
