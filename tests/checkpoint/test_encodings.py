"""fp32 elements in a file of another precision: the bits that torch makes of them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megalite.checkpoint import safetensors_file
from megalite.checkpoint.safetensors_file import ENCODINGS, SafetensorsFile, file_record, write_safetensors
from megalite.parallel.regions import Region

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def elements() -> np.ndarray:
    """Ties, halves of steps, the smallest and the largest, and a million random bit patterns."""
    bits = np.random.default_rng(0).integers(0, 1 << 32, size=1 << 20, dtype=np.uint64).astype(np.uint32)
    ties = np.arange(0x3F7F0000, 0x3F830000, 0x800, dtype=np.uint32)
    edges = np.array([0, 1 << 31, 1, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x00008000, 0x00018000], np.uint32)
    return np.concatenate([bits, ties, edges]).view(np.float32)


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast", "ignore:invalid value encountered in cast")
def test_rounding_is_torchs(precision: str) -> None:
    given = elements()
    encoding = ENCODINGS[precision]
    stored = encoding.encode(given)
    assert stored.itemsize == encoding.itemsize
    wanted = torch.from_numpy(given.copy()).to(DTYPES[precision]).float().numpy()
    np.testing.assert_array_equal(encoding.decode(stored), wanted)
    again = encoding.encode(encoding.decode(stored))
    numbers = ~np.isnan(given)
    np.testing.assert_array_equal(again.view(np.uint8), stored.view(np.uint8)) if precision != "fp16" else None
    np.testing.assert_array_equal(again[numbers], stored[numbers])


@pytest.mark.parametrize("precision", DTYPES)
def test_a_file_is_read_by_the_library(precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_file, "_PART", 7)
    arrays = {
        "a": np.linspace(-3, 3, 35, dtype=np.float32).reshape(7, 5),
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.array(2.5, np.float32),
    }
    path = tmp_path / "x.safetensors"
    shapes = {name: array.shape for name, array in arrays.items()}
    record = write_safetensors(path, shapes, arrays.values(), precision=precision, metadata={"format": "pt"})
    assert record == file_record(path)
    ours = SafetensorsFile(path)
    for name, tensor in load_file(path).items():
        wanted = torch.from_numpy(arrays[name]).to(DTYPES[precision])
        assert torch.equal(tensor, wanted)
        assert ours.shapes[name] == wanted.shape
        np.testing.assert_array_equal(ours.read(name, Region.whole(tuple(wanted.shape))), wanted.float().numpy())
    np.testing.assert_array_equal(ours.read("a", Region((2, 1), (3, 3))), load_file(path)["a"][2:5, 1:4].float())
