"""Vocabulary-parallel cross-entropy against F.cross_entropy, values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from harness import run_distributed

from megalite.parallel.sharding import ShardSpec, padded_vocabulary
from megalite.parallel.tensor_group import TensorGroup
from megalite.tensor_parallel import cross_entropy
from megalite.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy


def compare(vocab_size: int, dtype: torch.dtype, spread: float) -> None:
    dist = torch.distributed
    group = TensorGroup(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(3, 50, vocab_size, generator=generator) * spread).to(dtype)
    targets = torch.randint(0, vocab_size, (3, 50), generator=generator)
    targets[0, :2] = torch.tensor([0, vocab_size - 1])
    weights = torch.randn(3, 50, generator=generator)

    reference = logits.float().clone().requires_grad_()
    expected = F.cross_entropy(reference.flatten(0, 1), targets.flatten(), reduction="none").view(3, 50)
    (expected * weights).sum().backward()

    padded = padded_vocabulary(vocab_size, group.size)
    own = ShardSpec("head", (vocab_size, 1), {"tensor": 0}, padded).region(group.position).slices[0]
    share = padded // group.size
    # Padding columns hold a logit higher than any other: a loss that lets them in cannot come out right.
    local = torch.full((3, 50, share), 40.0 * spread, dtype=dtype)
    local[..., : own.stop - own.start] = logits[..., own]
    leaf = local.clone().requires_grad_()
    losses = vocab_parallel_cross_entropy(
        leaf * 1.0, targets, first_id=group.rank * share, vocab_size=vocab_size, group=group
    )
    assert losses.dtype == torch.float32
    # fp32: to rounding. bf16: the gradient is rounded twice to 8 bits.
    rtol, atol = (1e-5, 1e-6) if dtype == torch.float32 else (1.6e-2, 1e-5)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    (losses * weights).sum().backward()
    assert leaf.grad is not None
    assert reference.grad is not None
    real = own.stop - own.start
    torch.testing.assert_close(leaf.grad[..., :real].float(), reference.grad[..., own], rtol=rtol, atol=atol)
    assert not leaf.grad[..., real:].any()


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("vocab_size", [256, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_agrees_with_torch(world_size: int, vocab_size: int, dtype: torch.dtype) -> None:
    run_distributed(compare, world_size, vocab_size, dtype, 3.0)


def test_does_not_overflow_with_large_logits() -> None:
    run_distributed(compare, 2, 130, torch.float32, 1e3)


def test_no_copy_in_fp32_is_larger_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CPU_CHUNK_ELEMENTS", 1 << 10)
    logits = torch.randn(64, 512).bfloat16().requires_grad_()
    targets = torch.randint(0, 512, (64,))
    largest = 0
    plain_exp = torch.Tensor.exp_

    def watched(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, tensor.numel())
        return plain_exp(tensor)

    monkeypatch.setattr(torch.Tensor, "exp_", watched)
    vocab_parallel_cross_entropy(logits * 1.0, targets, group=TensorGroup()).mean().backward()
    assert 0 < largest <= 1 << 10
