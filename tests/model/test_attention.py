"""Causal attention against torch's own kernel, on every path it takes."""

import pytest
import torch
import torch.nn.functional as F

from megalite.model import causal_attention as module
from megalite.model.causal_attention import causal_attention


@pytest.mark.parametrize("length", [1, 5, 128, 300, 512])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("written_out", [True, False])
def test_agrees_with_torch(length: int, kv_heads: int, written_out: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not written_out:
        monkeypatch.setattr(module, "WRITTEN_OUT_SCORES", 0)
    generator = torch.Generator().manual_seed(length)
    query, key, value = (
        torch.randn(2, length, heads, 16, generator=generator, dtype=torch.float64).float().requires_grad_()
        for heads in (4, kv_heads, kv_heads)
    )
    output = causal_attention(query, key, value)
    output.square().sum().backward()
    exact = [x.detach().double().requires_grad_() for x in (query, key, value)]
    q, k, v = (x.transpose(1, 2) for x in exact)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    expected.square().sum().backward()
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
    for found, wanted in zip((query, key, value), exact, strict=True):
        assert found.grad is not None
        torch.testing.assert_close(found.grad.double(), wanted.grad, rtol=1e-4, atol=1e-4)


def test_no_position_sees_a_later_one() -> None:
    query, key, value = (torch.randn(1, 200, 2, 8) for _ in range(3))
    before = causal_attention(query, key, value)
    key[:, 150:], value[:, 150:] = 9.0, 9.0
    assert torch.equal(causal_attention(query, key, value)[:, :150], before[:, :150])
