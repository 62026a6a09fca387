"""Monkey patches of DeepSpeed, each with the behaviour that makes it necessary (`DeepSpeed:`)."""

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


def set_deepspeed_log_level(reports: bool) -> None:
    """Let DeepSpeed log errors alone, or with `reports` everything."""
    logging.getLogger("DeepSpeed").setLevel(logging.INFO if reports else logging.ERROR)
    # Warnings of torch about deprecated collectives concern DeepSpeed's authors, not megalite's users.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


def _import_muon_uncompiled() -> None:
    # DeepSpeed: ZeRO always imports the Muon optimizer, whose functions are passed to torch.compile at their
    # definition, which imports the compiler for two seconds. Nothing here uses it.
    compiled = compiler.compile
    compiler.compile = lambda *_, **__: lambda function: function  # pyright: ignore[reportAttributeAccessIssue]
    try:
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    finally:
        compiler.compile = compiled  # pyright: ignore[reportAttributeAccessIssue]


def patch_deepspeed(mesh: Mesh) -> None:
    """Apply the patches that the engine needs, before `deepspeed.initialize`."""
    _import_muon_uncompiled()
    if mesh.device.type == "cpu":
        # DeepSpeed: on a CPU every start compiles a shared-memory all-reduce with g++ for a minute, and a build that is
        # killed leaves a lock on which every later run hangs. gloo needs no build.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # pyright: ignore[reportAttributeAccessIssue]
        # DeepSpeed: it refuses fp16 on a CPU without fp16 matrix units, where torch computes it, but slowly.
        cast(Any, get_accelerator()).is_fp16_supported = lambda: True

    def assert_same_in_data_group(numbers: list[int]) -> None:
        mine = torch.tensor(numbers, dtype=torch.int64, device=mesh.device)
        extremes = torch.stack((mine, -mine))
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=mesh.shard.process_group)
        if not torch.equal(extremes[0], -extremes[1]):
            raise RuntimeError("the ranks of one data-parallel group use their parameters in different orders")

    # DeepSpeed: at stage 3 all ranks compare the order of their parameters with rank 0 of the world, and hang where
    # pipeline stages hold different modules. Only the ranks of a data-parallel group must agree.
    parameter_coordinator.assert_ints_same_as_other_ranks = assert_same_in_data_group
