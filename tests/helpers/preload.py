"""What the server of `harness` imports, once, on behalf of every rank."""

import gc
import sys
from contextlib import suppress
from importlib import import_module

NAMES = (
    *("torch", "numpy", "pytest", "hypothesis", "deepspeed", "megalite.training.train"),
    # What torch.testing and DeepSpeed's engine import when they are first used: two seconds a rank.
    *("torch.distributed.tensor", "torch._dynamo.testing", "torch._inductor.compile_fx", "deepspeed.compile.backend"),
    *("deepspeed.module_inject.auto_ep_layer", "deepspeed.runtime.zero.muon.muon_optimizer"),
    # What rank 0 writes its curves with: two seconds a run.
    *("torch.utils.tensorboard.summary", "matplotlib.figure", "matplotlib.backends.backend_agg"),
)

for name in NAMES:
    # A module that cannot be imported fails the tests that use it, not all.
    with suppress(Exception):
        import_module(name)

if "deepspeed" in sys.modules:
    # Otherwise its first engine on a CPU compiles this operator, also over a process group that was there before.
    sys.modules["deepspeed"].ops.__compatible_ops__["deepspeed_shm_comm"] = False

# A collection would visit, and so copy into every rank, all that is loaded by now.
gc.collect()
gc.freeze()
