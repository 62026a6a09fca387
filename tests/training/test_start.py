"""What a start costs before its first step: modules that nothing here uses, and an optimizer without the compiler."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from megalite.optim.torch_adamw import AdamW

LAST_WORDS = """
import os, sys
from megalite import cli

def leave(status):
    unused = {"torch._dynamo", "torch._inductor", "sympy", "transformers", "pandas"}
    print("imported:", *sorted(unused & set(sys.modules)))
    sys.stdout.flush()
    os._exit(status)

cli.leave = leave
cli.main(["train", *sys.argv[1:]])
"""


def test_a_rank_trains_without_torchs_compiler(run_file: Path) -> None:
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = subprocess.run(
        [sys.executable, "-c", LAST_WORDS, str(run_file), "train.steps=1", "train.schedule.warmup_steps=0"],
        env={**os.environ, **place, "MASTER_PORT": str(20000 + os.getpid() % 10000)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "step 1/1" in done.stdout
    assert done.stdout.splitlines()[-1] == "imported:"


@pytest.mark.parametrize("after_torchs_own", [False, True])
def test_the_optimizer_is_torchs_to_the_last_bit(after_torchs_own: bool) -> None:
    """Also where torch's optimizer was made before, which then has the profiler's hook around its step."""
    models, states = [], []
    for kind in (torch.optim.AdamW, AdamW) if after_torchs_own else (AdamW, torch.optim.AdamW):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
        optimizer = kind(model.parameters(), lr=1e-2, betas=(0.8, 0.9), weight_decay=0.1, fused=True)
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.randn(4, 8)).square().sum().backward()
            optimizer.step()
        assert torch.is_grad_enabled()
        models.append(model)
        states.append(optimizer.state_dict()["state"])
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(ours, theirs)
    for number, values in states[0].items():
        assert all(torch.equal(value, states[1][number][name]) for name, value in values.items())
