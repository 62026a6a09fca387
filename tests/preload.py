"""What the server of `harness` imports, once, on behalf of every rank."""

import sys
from contextlib import suppress
from importlib import import_module

for name in ("torch", "numpy", "pytest", "hypothesis", "deepspeed", "megalite.zero", "megalite.train"):
    # A module that cannot be imported fails the tests that use it, not all.
    with suppress(Exception):
        import_module(name)

if "deepspeed" in sys.modules:
    # Otherwise its first engine on a CPU compiles this operator, also over a process group that was there before.
    sys.modules["deepspeed"].ops.__compatible_ops__["deepspeed_shm_comm"] = False
