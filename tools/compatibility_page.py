"""``python tools/compatibility_page.py > docs/reference/composition.md``: the page of settings that go together.

Every answer is that of the rules which a run is checked by before it starts: each pair of features is written into a
run file at tensor 2 x pipeline 2 x data 2, and resolved.
"""

import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

from megalite.config import load_run_config
from megalite.errors import UserError

_RUN = """\
run: {dir: runs/composition}
model: {architecture: llama, vocab_size: 512, hidden_size: 64, num_hidden_layers: 8, num_attention_heads: 8,
        num_key_value_heads: 4, intermediate_size: 96, max_position_embeddings: 64}
data: {sequence_length: 64, train: [{prefix: data/corpus}]}
parallel: {tensor: 2, pipeline: 2, data: 2}
train: {steps: 10, global_batch_size: 16, micro_batch_size: 1}
deepspeed: {zero_optimization: {stage: 1}}
"""
_FILE = "run.yaml"


@dataclass(frozen=True, slots=True)
class Feature:
    """Something that a run file can ask for, and the keys that ask for it."""

    name: str
    keys: Mapping[str, str] = field(default_factory=dict)


_ZERO, _OFFLOAD = "deepspeed.zero_optimization.stage", "deepspeed.zero_optimization.offload_"
_CHECKPOINTING = "deepspeed.activation_checkpointing"
_INTERLEAVED = {"parallel.schedule": "interleaved_1f1b", "parallel.virtual_stages": "2"}
SCHEDULES = (
    Feature("gpipe", {"parallel.schedule": "gpipe"}),
    Feature("1f1b", {"parallel.schedule": "1f1b"}),
    Feature("interleaved_1f1b", _INTERLEAVED),
    Feature("zb_h1", {"parallel.schedule": "zb_h1"}),
    Feature("zb_v", {"parallel.schedule": "zb_v", "parallel.virtual_stages": "2"}),
)
STAGES = tuple(Feature(f"ZeRO-{stage}", {_ZERO: str(stage)}) for stage in range(4))
PRECISIONS = (
    Feature("fp32"),
    Feature("bf16", {"deepspeed.bf16": "{enabled: true}"}),
    Feature("fp16", {"deepspeed.fp16": "{enabled: true}"}),
)
OTHERS = (
    Feature("optimizer on the host", {f"{_OFFLOAD}optimizer": "{device: cpu}"}),
    Feature(
        "optimizer and parameters on the host",
        {_ZERO: "3", f"{_OFFLOAD}optimizer": "{device: cpu}", f"{_OFFLOAD}param": "{device: cpu}"},
    ),
    Feature(
        "optimizer on NVMe",
        {_ZERO: "3", f"{_OFFLOAD}optimizer": "{device: nvme, nvme_path: /nvme}"},
    ),
    Feature("sequence parallelism", {"parallel.sequence_parallel": "true"}),
    Feature("recompute: selective", {"train.recompute": "selective"}),
    Feature("recompute: full", {"train.recompute": "full"}),
    Feature("recompute: one layer in two", {"train.recompute": "full", "train.recompute_every": "2"}),
    Feature("recompute: kept inputs divided", {f"{_CHECKPOINTING}.partition_activations": "true"}),
    Feature("recompute: kept inputs on the host", {f"{_CHECKPOINTING}.cpu_checkpointing": "true"}),
    Feature("recompute: 4 kept inputs", {f"{_CHECKPOINTING}.number_checkpoints": "4"}),
    Feature("compiled layers", {"train.compile": "true"}),
    Feature("dropout", {"model.hidden_dropout": "0.1", "model.attention_dropout": "0.1"}),
    Feature("tied embeddings", {"model.tie_word_embeddings": "true"}),
    Feature("packed documents", {"data.reset_attention_mask": "true", "data.reset_position_ids": "true"}),
    Feature("losses masked at document ends", {"data.eod_mask_loss": "true"}),
    Feature("a growing batch", {"train.batch_size_rampup": "{start: 4, increment: 4, samples: 100}"}),
    Feature("uneven stages", {"parallel.stage_layers": "[5, 3]"}),
    Feature("checkpoints", {"checkpoint.every": "5"}),
)
_INSTEAD = {
    ("uneven stages", name): Feature("uneven stages", {"parallel.stage_layers": "[3, 2, 2, 1]"})
    for name in (
        "interleaved_1f1b",
        "zb_v",
    )
}
"""What means the same beside another feature."""


def composition_page() -> str:
    """Return the page, in Markdown."""
    columns = (*SCHEDULES, *STAGES, *PRECISIONS)
    rows = (*STAGES, *PRECISIONS, *OTHERS)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / _FILE
        path.write_text(_RUN, encoding="utf-8")
        reasons = _Reasons(path)
        table = [_row(row, columns, reasons) for row in rows]
        others = [
            f"- {first.name} with {second.name}: {reason}\n"
            for first, second in combinations(OTHERS, 2)
            if (reason := reasons.between(first, second))
        ]
    head = f"| | {' | '.join(column.name for column in columns)} |\n| --- |{' :-: |' * len(columns)}\n"
    notes = "".join(f"{number}. {reason}\n" for reason, number in reasons.numbers.items())
    return _PAGE.format(run=_RUN, table=head + "".join(table), notes=notes, others="".join(others) or "- none\n")


_PAGE = """\
# Which settings go together

`python tools/compatibility_page.py` makes this page from the rules that check a run before it starts: each pair is
written into the run file below and resolved.

- ✓: the pair is allowed. `tests/full/test_compatibility.py` and `tests/training/test_parity.py` compare it with one
  process, on CPUs, except for the optimizer on NVMe, which has never run.
- A number: the pair is refused, for the reason below the table.

In bf16 and fp16 ZeRO-0 runs as ZeRO-1, and the start says so. Tensor, pipeline and data parallelism go with each other
and with every setting of this page.

{table}
{notes}
Among the features of the rows, these pairs are refused; all other pairs are allowed:

{others}
The run file, at tensor 2 x pipeline 2 x data 2:

```yaml
{run}```
"""


class _Reasons:
    """The rules' answers; a reason that stands in the table has a number, counted as they come."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.numbers: dict[str, int] = {}

    def between(self, first: Feature, second: Feature) -> str | None:
        """Return why two features do not go together; None where they do. The second's keys win over the first's."""
        first = _INSTEAD.get((first.name, second.name), first)
        overrides = [f"{key}={value}" for key, value in {**first.keys, **second.keys}.items()]
        try:
            load_run_config(self._path, overrides).resolve(world_size=None, vocab_size=None)
        except UserError as error:
            return "; and ".join(line.partition(": ")[2] for line in str(error).splitlines())
        return None

    def number(self, reason: str) -> int:
        """Return a reason's number."""
        return self.numbers.setdefault(reason, len(self.numbers) + 1)


def _row(row: Feature, columns: Sequence[Feature], reasons: _Reasons) -> str:
    return f"| {row.name} | {' | '.join(_cells(row, columns, reasons))} |\n"


def _cells(row: Feature, columns: Sequence[Feature], reasons: _Reasons) -> Iterator[str]:
    for column in columns:
        if any(row in group and column in group for group in (STAGES, PRECISIONS)):
            yield ""
        else:
            reason = reasons.between(row, column)
            yield "✓" if reason is None else str(reasons.number(reason))


if __name__ == "__main__":
    sys.stdout.write(composition_page())
