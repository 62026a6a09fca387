"""Which token is chosen, against the definition of each rule."""

import pytest
import torch

from megalite.errors import UserError
from megalite.generation.request import Limits, Sampling
from megalite.generation.sampling import choose, probabilities

CHANCES = torch.tensor([[0.1, 0.4, 0.0, 0.3, 0.2]], dtype=torch.float64)
LOGITS = CHANCES.log()
JUST_BELOW_ONE = 1 - 2**-53


def test_greedy_takes_the_likeliest_whatever_is_drawn() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, -1.0, 1.9]])
    assert choose(logits, [0.99, 0.99], Sampling(temperature=0)) == [1, 0]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(1.0), [0.1, 0.4, 0.0, 0.3, 0.2]),
        (Sampling(0.5), [0.01 / 0.3, 0.16 / 0.3, 0.0, 0.09 / 0.3, 0.04 / 0.3]),
        (Sampling(1.0, top_k=1), [0, 1, 0, 0, 0]),
        (Sampling(1.0, top_k=2), [0, 4 / 7, 0, 3 / 7, 0]),
        (Sampling(1.0, top_k=9), [0.1, 0.4, 0.0, 0.3, 0.2]),
        (Sampling(1.0, top_p=0.3), [0, 1, 0, 0, 0]),
        (Sampling(1.0, top_p=0.5), [0, 4 / 7, 0, 3 / 7, 0]),
        (Sampling(1.0, top_p=0.75), [0, 4 / 9, 0, 3 / 9, 2 / 9]),
        (Sampling(1.0, top_p=1.0), [0.1, 0.4, 0.0, 0.3, 0.2]),
        # Of the three that top-k leaves, 4/9 and 3/9 reach 0.7.
        (Sampling(1.0, top_k=3, top_p=0.7), [0, 4 / 7, 0, 3 / 7, 0]),
    ],
)
def test_probabilities(sampling: Sampling, expected: list[float]) -> None:
    found = probabilities(LOGITS, sampling)
    torch.testing.assert_close(found, torch.tensor([expected], dtype=torch.float64), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("drawn", "token"),
    [(0.0, 0), (0.099, 0), (0.101, 1), (0.499, 1), (0.501, 3), (0.799, 3), (0.801, 4), (JUST_BELOW_ONE, 4)],
)
def test_a_number_falls_on_a_token_in_the_vocabularys_order(drawn: float, token: int) -> None:
    assert choose(LOGITS, [drawn], Sampling(1.0)) == [token]


def test_no_number_falls_on_a_token_of_no_probability() -> None:
    logits = torch.full((64, 1000), float("-inf"))
    logits[:, 300:700] = torch.randn(64, 400, generator=torch.Generator().manual_seed(1))
    for drawn in (0.0, JUST_BELOW_ONE):
        for sampling in (Sampling(1.0), Sampling(0.7, top_k=5), Sampling(1.3, top_p=0.9)):
            assert all(300 <= token < 700 for token in choose(logits, [drawn] * 64, sampling))


def test_tokens_come_as_often_as_their_probabilities_say() -> None:
    drawn = ((torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000).tolist()
    tokens = torch.tensor(choose(LOGITS.expand(10_000, -1), drawn, Sampling(1.0)))
    assert torch.bincount(tokens, minlength=5).tolist() == [1000, 4000, 0, 3000, 2000]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sampling(-0.1), "--temperature=-0.1: "),
        (lambda: Sampling(float("nan")), "--temperature=nan: "),
        (lambda: Sampling(1.0, top_k=0), "--top-k=0: "),
        (lambda: Sampling(1.0, top_p=0.0), "--top-p=0.0: "),
        (lambda: Sampling(1.0, top_p=1.1), "--top-p=1.1: "),
        (lambda: Limits(0), "--max-new-tokens=0: "),
        (lambda: Limits(5, ("a", "")), "--stop: is empty"),
    ],
)
def test_what_cannot_be_is_refused(make, message: str) -> None:
    with pytest.raises(UserError) as raised:
        make()
    assert str(raised.value).startswith(message)
