"""Changes to DeepSpeed's modules that the engine needs, each beside the behaviour that asks for it."""

import logging
import warnings
from typing import Any, cast

import deepspeed
import deepspeed.runtime.zero.partitioned_param_coordinator as parameter_coordinator
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime import compiler

from megalite.parallel.mesh import Mesh


def quieten_deepspeed(reports: bool) -> None:
    logging.getLogger("DeepSpeed").setLevel(logging.INFO if reports else logging.ERROR)
    # torch's advice on the collectives that DeepSpeed calls is for DeepSpeed's authors.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


def _import_muon_uncompiled() -> None:
    # DeepSpeed: ZeRO imports the Muon optimizer, whoever asks for it, and the functions there are handed to
    # torch.compile as they are defined: two seconds of imports that nothing here uses.
    compiled = compiler.compile
    compiler.compile = lambda *_, **__: lambda function: function  # pyright: ignore[reportAttributeAccessIssue]
    try:
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    finally:
        compiler.compile = compiled  # pyright: ignore[reportAttributeAccessIssue]


def adapt_deepspeed(mesh: Mesh) -> None:
    _import_muon_uncompiled()
    if mesh.device.type == "cpu":
        # DeepSpeed: on CPU every start compiles a shared-memory all-reduce with g++, a minute long, and a build that
        # is killed leaves a lock on which every later run hangs. gloo serves.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # pyright: ignore[reportAttributeAccessIssue]
        # DeepSpeed: it refuses fp16 on a CPU without fp16 matrix units, where torch computes it all the same, slowly.
        cast(Any, get_accelerator()).is_fp16_supported = lambda: True

    def assert_same_in_data_group(numbers: list[int]) -> None:
        mine = torch.tensor(numbers, dtype=torch.int64, device=mesh.device)
        extremes = torch.stack((mine, -mine))
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=mesh.shard.process_group)
        if not torch.equal(extremes[0], -extremes[1]):
            raise RuntimeError("the ranks of one data-parallel group use their parameters in different orders")

    # DeepSpeed: at stage 3 it compares the order of parameters with rank 0 of the world, and hangs where stages
    # hold different modules. The ranks that must agree are those of one data-parallel group.
    parameter_coordinator.assert_ints_same_as_other_ranks = assert_same_in_data_group
