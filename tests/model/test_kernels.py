"""16-bit products in fp32 beside native ones, and the measurement that chooses between ways to compute."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from harness import run_distributed
from model.cut_stages import LLAMA, cu_seqlens, loss_of, model_config
from training import build_trainer

from megalite.kernels import choice as kernels_module
from megalite.kernels.choice import AttentionKernel, Kernels, Products, choose_products, time_ratio
from megalite.model import kernel_choice
from megalite.model.causal_attention import causal_attention
from megalite.model.kernel_choice import choose_kernels
from megalite.model.microbatch import Microbatch
from megalite.model.stage import Stage
from megalite.monitoring.device import device_peak, matrix_rate
from megalite.parallel.tensor_group import TensorGroup

CPU = torch.device("cpu")
WIDE = Kernels("fp32", "fused")
SIXTEEN_BIT = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
def test_an_upcast_product_is_the_exact_one_rounded_once(dtype: torch.dtype) -> None:
    a, b, bias = torch.randn(9, 40).to(dtype), torch.randn(40, 7).to(dtype), torch.randn(7).to(dtype)
    assert torch.equal(WIDE.matmul(a, b), (a.float() @ b.float()).to(dtype))
    assert torch.equal(WIDE.linear(a, b.t(), None), (a.float() @ b.float()).to(dtype))
    exact = (a.float() @ b.float() + bias.float()).to(dtype)
    torch.testing.assert_close(WIDE.linear(a, b.t(), bias), exact)
    assert WIDE.linear(a, b.t(), bias).dtype == dtype


def test_fp32_operands_are_not_touched() -> None:
    x = torch.randn(3, 4)
    assert WIDE.upcast(x)[0] is x
    assert torch.equal(WIDE.matmul(x, x.t()), x @ x.t())


class Products16:
    """Counts the products of 16-bit matrices that torch computes, by watching every operator."""

    def __init__(self) -> None:
        from torch.utils._python_dispatch import TorchDispatchMode

        counter = self
        self.names: list[str] = []

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN202
                name = str(func)
                product = any(part in name for part in ("mm", "linear", "attention", "bmm", "mv"))
                sixteen = any(isinstance(x, torch.Tensor) and x.dtype in SIXTEEN_BIT for x in args)
                if product and sixteen:
                    counter.names.append(name)
                return func(*args, **(kwargs or {}))

        self.mode = Watch()


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@pytest.mark.parametrize("attention", ["written_out", "fused"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"num_key_value_heads": 1}, {"attention_bias": True}, {"qk_norm": True}, {"tie_word_embeddings": True}],
    ids=["plain", "one key head", "biases", "normed", "tied"],
)
def test_no_16_bit_product_is_left_in_a_step(
    dtype: torch.dtype, attention: AttentionKernel, changes: dict[str, object]
) -> None:
    """Forward, and both gradients of every linear layer, attention and head."""

    def run(kernels: Kernels) -> tuple[list[str], torch.Tensor, list[torch.Tensor]]:
        group = TensorGroup(kernels=kernels)
        stage = Stage(model_config({**LLAMA, **changes}), range(2), index=0, num_stages=1, group=group)
        stage.initialise(7)
        stage.to(dtype)
        products = Products16()
        ids = torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(1))
        with products.mode:
            loss = loss_of([stage], Microbatch(ids, ids.roll(-1)))
            loss.backward()
        return products.names, loss.detach(), [p.grad for p in stage.parameters() if p.grad is not None]

    native_names, native_loss, native_grads = run(Kernels("native", attention))
    names, loss, grads = run(Kernels("fp32", attention))
    assert native_names
    assert names == []
    torch.testing.assert_close(loss, native_loss, rtol=1e-2, atol=0)
    assert all(grad.dtype == dtype for grad in grads)
    for grad, native in zip(grads, native_grads, strict=True):
        torch.testing.assert_close(
            grad.float(), native.float(), rtol=0.1, atol=0.05 * float(native.float().abs().max())
        )


@pytest.mark.parametrize("lengths", [None, [5, 11, 8, 8]])
@pytest.mark.parametrize("attention", ["written_out", "fused"])
def test_upcast_attention_is_that_of_fp32(lengths: list[int] | None, attention: AttentionKernel) -> None:
    query, key, value = (torch.randn(2, 16, heads, 8).bfloat16() for heads in (4, 2, 2))
    documents = None if lengths is None else cu_seqlens([lengths])
    found = causal_attention(query, key, value, documents, kernels=Kernels("fp32", attention))
    exact = causal_attention(query.float(), key.float(), value.float(), documents)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), exact, rtol=2**-8, atol=1e-5)


def pretend(monkeypatch: pytest.MonkeyPatch, ratio: float | None) -> None:
    """Have every measurement find that the first way takes `ratio` times as long; None: nothing may be measured."""

    def measured(first: object, second: object) -> float:
        assert ratio is not None, "it was measured"
        return ratio

    monkeypatch.setattr(kernels_module, "time_ratio", measured)
    monkeypatch.setattr(kernel_choice, "time_ratio", measured)


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@pytest.mark.parametrize(("ratio", "expected"), [(30.0, "fp32"), (1.6, "fp32"), (1.4, "native"), (0.4, "native")])
def test_a_measurement_chooses_the_products(
    dtype: torch.dtype, ratio: float, expected: Products, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, ratio)
    assert choose_products(CPU, dtype) == expected
    pretend(monkeypatch, None)
    assert choose_products(CPU, torch.float32) == "native"
    assert choose_products(torch.device("cuda"), dtype) == "native"


@pytest.mark.parametrize(
    ("saved", "ratio", "expected"),
    [("native", 1.9, "native"), ("native", 2.1, "fp32"), ("fp32", 0.6, "fp32"), ("fp32", 0.4, "native")],
)
@pytest.mark.parametrize("attention", ["fused", "written_out"])
def test_a_resumed_run_computes_as_it_did(
    saved: Products, attention: AttentionKernel, ratio: float, expected: Products, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, ratio)
    assert choose_kernels(CPU, torch.bfloat16, saved=Kernels(saved, attention)) == Kernels(expected, attention)
    pretend(monkeypatch, None)
    assert choose_kernels(CPU, torch.float32, saved=Kernels("native", attention)) == Kernels("native", attention)


@pytest.mark.parametrize(("ratio", "expected"), [(2.0, "written_out"), (1.25, "fused"), (1.0, "fused"), (0.5, "fused")])
def test_attention_is_chosen_by_time_and_settings_stand(
    ratio: float, expected: AttentionKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, ratio)
    assert choose_kernels(CPU, torch.float32).attention == expected
    pretend(monkeypatch, None)
    assert choose_kernels(CPU, torch.bfloat16, products="fp32", attention="fused") == Kernels("fp32", "fused")
    assert choose_kernels(torch.device("cuda"), torch.bfloat16) == Kernels("native", "fused")


def test_two_ways_are_timed_in_turn() -> None:
    calls: list[str] = []

    def work(name: str, size: int) -> None:
        calls.append(name)
        F.linear(torch.randn(size, size), torch.randn(size, size))

    assert time_ratio(lambda: work("a", 512), lambda: work("b", 64), budget=0.0) > 3
    assert calls == ["a", "b"] * 3


@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN_BIT])
def test_the_peak_is_that_of_the_faster_way(dtype: torch.dtype) -> None:
    flops, source = device_peak(CPU, dtype)
    ways = [matrix_rate(CPU, dtype, Kernels(way), seconds=0.0) for way in ("native", "fp32")]
    assert flops > 0.3 * max(ways)
    assert source.startswith("measured")


def kernels_rank(path: str, overrides: list[str]) -> tuple[Kernels, list[float], dict[str, object]]:
    """Train on this rank; return how it computes, its losses, and what a checkpoint would say of it."""
    trainer = build_trainer(path, overrides)
    losses = [trainer.step(step).loss for step in range(1, trainer.config.train.steps + 1)]
    told = trainer._progress(trainer.config.train.steps)["kernels"]
    trainer.close()
    return trainer.kernels, losses, told


SMALL = [
    *("model.hidden_size=32", "model.intermediate_size=48", "model.num_hidden_layers=2", "model.vocab_size=256"),
    *("model.num_attention_heads=2", "model.num_key_value_heads=1", "train.steps=50", "train.optimizer.lr=1e-2"),
]
PRECISIONS = {
    "bf16": "deepspeed.bf16={enabled: true}",
    "fp16": "deepspeed.fp16={enabled: true, initial_scale_power: 8}",
}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_fifty_steps_by_both_ways_agree_within_their_rounding(run_file: Path, precision: str) -> None:
    traces = {}
    for products in ("native", "fp32"):
        overrides = [*SMALL, PRECISIONS[precision], f"train.cpu_products={products}"]
        [(kernels, losses, told)] = run_distributed(kernels_rank, 1, str(run_file), overrides)
        assert kernels.products == products == told["products"]
        traces[products] = losses
    native, wide = traces["native"], traces["fp32"]
    assert wide != native, "the two ways were the same"
    assert wide[-1] < wide[0] - 0.1
    for step, (a, b) in enumerate(zip(native, wide, strict=True), 1):
        assert abs(a / b - 1) < 0.01, f"step {step}: {a} native, {b} in fp32"


def test_all_ranks_compute_alike(run_file: Path) -> None:
    layout = ["parallel.tensor=2", "parallel.pipeline=1", "model.num_key_value_heads=2", "train.steps=3"]
    overrides = [*SMALL, PRECISIONS["bf16"], *layout]
    (first, *_), (second, *_) = run_distributed(kernels_rank, 2, str(run_file), overrides)
    assert first == second
