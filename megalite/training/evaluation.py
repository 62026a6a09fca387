"""Evaluation: the mean loss over a validation set, by forwards through the pipeline."""

from megalite.config import RunConfig
from megalite.data.collate import SampleRules
from megalite.data.datasets import Datasets
from megalite.model.loss import LOSS
from megalite.parallel.mesh import Mesh
from megalite.pipeline.executor import PipelineExecutor, StepResult
from megalite.pipeline.schedules import forward_only
from megalite.training.microbatches import MicrobatchLoader
from megalite.training.named_losses import NamedLosses
from megalite.training.stop_requests import StopRequests


class Evaluator:
    """Evaluates the stages of an executor on the validation sets of a run."""

    def __init__(
        self, executor: PipelineExecutor, config: RunConfig, datasets: Datasets, mesh: Mesh, stop: StopRequests
    ) -> None:
        self._executor, self._config, self._datasets, self._mesh, self._stop = executor, config, datasets, mesh, stop
        self._losses = NamedLosses(mesh)
        rules = SampleRules.of(config, None)  # the text as it is, without fill-in-the-middle
        self._loaders = {
            name: MicrobatchLoader(samples, rules, config, mesh, trains=False)
            for name, samples in datasets.valid.items()
        }

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the validation sets."""
        return tuple(self._loaders)

    def evaluate(self, name: str) -> float:
        """Return the mean loss over the unmasked targets of a validation set. Collective.

        It is over the first `eval_batches` global batches, or over all samples if there are fewer; the last batch may
        be partial. After a stop request it returns the mean over the batches so far, which must not be used.
        """
        size, end = self._config.train.global_batch_size, self._datasets.num_evaluated(name)
        total, tokens = 0.0, 0.0
        for first in range(0, end, size):
            if self._stop.agreed is not None:
                break
            loss, weight = self._evaluate_batch(self._loaders[name], range(first, min(first + size, end)))
            total, tokens = total + loss * weight, tokens + weight
        return total / max(tokens, 1.0)

    def _evaluate_batch(self, loader: MicrobatchLoader, samples: range) -> tuple[float, float]:
        """Return the mean loss of some samples, and the number of targets that it is over."""
        batch = loader.read_padded(samples)
        num_loss_tokens = loader.num_loss_tokens(batch)
        microbatches = loader.microbatches(batch, num_loss_tokens)
        stream = forward_only(self._mesh.pipeline.rank, self._executor.placement, len(batch))
        result = self._executor.run(stream, microbatches)
        loss = reduce_losses(result, self._losses, self._stop)[LOSS]
        every = len(samples) * self._config.data.sequence_length
        return loss, float(every if num_loss_tokens is None else num_loss_tokens)


def reduce_losses(result: StepResult, losses: NamedLosses, stop: StopRequests) -> dict[str, float]:
    """Return the losses of all stages, the same on every rank; the same all-reduce agrees on whether to stop."""
    means, local_flags = losses.reduce(result.losses, stop.local_flags())
    stop.synchronize(local_flags)
    return means
