"""A plugin: a dataset of padded samples with a loss mask, a focal loss, and a callback that writes what it sees."""

from pathlib import Path

import torch
from torch import Tensor

import megalite


@megalite.register_dataset("counting")
class Counting:
    """Sequences that count in steps of `stride`, of lengths that differ; every third token is no target."""

    def __init__(self, config: megalite.RunConfig, stride: int = 1) -> None:
        self.longest, self.stride = config.data.sequence_length + 1, stride

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> megalite.TokenSample:
        length = 5 + (index * 7) % (self.longest - 4)
        tokens = [(index + self.stride * place) % 61 for place in range(length)]
        return megalite.TokenSample(tokens, [place % 3 != 0 for place in range(length)])


@megalite.register_loss("focal")
def focal(logits, microbatch) -> dict[str, Tensor]:
    """The focal loss (arXiv:1708.02002) with gamma 2."""
    losses = logits.cross_entropy(microbatch.targets)
    return {"loss": microbatch.average((1 - torch.exp(-losses)) ** 2 * losses)}


@megalite.register_callback("writer")
class Writer(megalite.Callback):
    """Writes a line for each call to ``seen_by_rank_N`` in the run's folder."""

    def on_start(self, start: megalite.RunStart) -> None:
        self.file = Path(start.config.run.dir, f"seen_by_rank_{start.mesh.rank}").open("w")  # noqa: SIM115
        self.tell("start", start.step)

    def before_step(self, step: int) -> None:
        self.tell("before", step)

    def after_step(self, report: megalite.StepReport) -> None:
        self.tell("after", report.step, report.loss.hex())

    def on_rollback(self, step: int, back: int, skipped_samples: int) -> None:
        self.tell("rollback", step, back, skipped_samples)

    def on_evaluate(self, step: int, name: str, loss: float) -> None:
        self.tell("evaluate", step, name, loss.hex())

    def on_checkpoint(self, report) -> None:
        self.tell("checkpoint", report.step)

    def on_end(self, end: megalite.RunEnd) -> None:
        self.tell("end", end.step, end.complete, end.stopped_by)

    def close(self) -> None:
        self.tell("close")
        self.file.close()

    def tell(self, *words: object) -> None:
        print(*words, file=self.file)
