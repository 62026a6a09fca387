"""Compare one step of a layout with the reference: rank 0 broadcasts its tensors, every rank compares its part.

There are four comparisons: the weights before the step, which must be equal to the bit; the loss and the gradient's
global norm; the reduced gradients in ZeRO's partitions; and the weights after the step. The first step of AdamW and
Lion moves a weight by nearly the learning rate in the direction of its gradient's sign, so that a gradient that is only
rounding error around zero may move it either way. The weights after the step are therefore compared with the optimizer
applied to the reference's weights with the gradients and the global norm *of this layout*, which have already been
compared with the reference's. Frozen weights must be equal to the reference's.
"""

import datetime
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from math import inf, isnan, prod

import torch
import torch.distributed as dist
from pydantic import TypeAdapter
from torch import Tensor, nn

from megalite.checkpoint.fragments import Fragment
from megalite.data.datasets import open_datasets
from megalite.launch import LaunchEnvironment
from megalite.parallel.json_collectives import gather_json, on_rank_zero
from megalite.parallel.mesh import joined_mesh, local_device
from megalite.parallel.regions import Region
from megalite.planning.plan import Plan
from megalite.training.trainer import Trainer
from megalite.verify.parity_report import (
    GRADIENT_TOLERANCE,
    NOISE_SHARE,
    START_TOLERANCE,
    UPDATE_TOLERANCE,
    ParameterDifference,
    ParityReport,
    TensorComparison,
)
from megalite.verify.reference import Reference


def verify_layout(plan: Plan, environment: LaunchEnvironment) -> ParityReport:
    """Run one rank of a plan's first step, compare it with the reference, and return the report of all ranks.

    Collective. Raises UserError for mistakes in the user's input, FloatingPointError if the gradient is not finite.
    """
    timeout = datetime.timedelta(seconds=plan.config.train.timeout_seconds)
    device = local_device(environment.local_rank, environment.launcher)
    # DeepSpeed reads LOCAL_RANK from the environment, and not every launcher sets it.
    os.environ.setdefault("LOCAL_RANK", str(environment.local_rank))
    with joined_mesh(plan.layout, environment.rank, device=device, timeout=timeout, placement=plan.placement) as mesh:
        datasets = open_datasets(plan.config)
        trainer = Trainer(plan, mesh, datasets)
        reference = Reference(plan, datasets, device, trainer.kernels) if mesh.rank == 0 else None
        report = compare(trainer, reference)
        trainer.close()
    return report


def compare(trainer: Trainer, reference: Reference | None) -> ParityReport:
    """Run a trainer's first step and compare it with `reference`, which is None on all ranks but 0. Collective."""
    return _Comparison(trainer, reference).run()


@dataclass(frozen=True, slots=True)
class _Piece:
    """A region of a global tensor that this rank holds, and its elements, flat."""

    elements: Tensor
    region: Region

    def of(self, whole: Tensor) -> Tensor:
        """Return the same region of a whole tensor, flat."""
        return whole[self.region.slices].reshape(-1)


_Pieces = Mapping[str, list[_Piece]]
"""This rank's pieces of each global tensor, by name."""
_Measure = Callable[[str, int, _Piece, Tensor], float]
"""Measures the difference of a piece, given by the tensor's name and the piece's index, from the reference's tensor."""


class _Comparison:
    def __init__(self, trainer: Trainer, reference: Reference | None) -> None:
        self.trainer, self.mesh, self.reference = trainer, trainer.mesh, reference
        self.shapes = trainer.plan.requirements.shapes
        self.gradients: _Pieces = {}
        self.stage_of = {
            shard.spec.name: index
            for index, stage in sorted(trainer.engine.stages.items(), reverse=True)
            for placed in stage.placed_parameters
            for shard in placed.shards
        }

    def run(self) -> ParityReport:
        missing = self._elements_missing()
        start = self._compare("weight", self._weights(), self._relative, START_TOLERANCE)
        report = self.trainer.step(1, before_update=self._keep_gradients)
        loss, norm = self._reference_loss_and_norm()
        self.noise = NOISE_SHARE * norm
        gradients = self._compare("gradient", self.gradients, self._relative_to_noise, GRADIENT_TOLERANCE)
        self.clip = self._clip_factor(report.outcome.grad_norm)
        update = self._compare("weight", self._weights(), self._beyond_the_update, UPDATE_TOLERANCE)
        found = ParityReport(
            parameters=len(self.shapes),
            elements_missing=missing,
            loss=report.loss,
            reference_loss=loss,
            # If the gradients were not averaged, the replicas have different norms: report the one farthest off.
            norm=max(gather_json(report.outcome.grad_norm, self.mesh), key=lambda found: abs(found - norm)),
            reference_norm=norm,
            start=start,
            gradients=gradients,
            update=update,
        )
        return replace(found, miscounted=on_rank_zero(lambda: self._miscounted(found), self.mesh))

    # ------------------------------------------------------------------------------------------ this rank's tensors

    def _weights(self) -> _Pieces:
        return _by_name(self.trainer.state.fragments(), "weight", self.mesh.device)

    def _keep_gradients(self) -> None:
        # Copy the gradients, since the step clips them in place.
        all_pieces = _by_name(self.trainer.state.gradients(), "gradient", self.mesh.device)
        self.gradients = {
            name: [_Piece(piece.elements.clone(), piece.region) for piece in pieces]
            for name, pieces in all_pieces.items()
        }

    def _elements_missing(self) -> int:
        """Return the model's elements minus those that the ranks save: 0 if each element is saved exactly once."""
        mine = sum(
            at.region.numel
            for number, fragment in enumerate(self.trainer.state.fragments())
            for at in fragment.regions(*fragment.share(number))
        )
        total = torch.tensor(mine, dtype=torch.int64, device=self.mesh.device)
        dist.all_reduce(total)
        return sum(map(prod, self.shapes.values())) - int(total)

    # ------------------------------------------------------------------------------------- the reference's tensors

    def _broadcast_tensors(self, kind: str) -> Iterator[tuple[int, str, Tensor]]:
        """Broadcast each global tensor of the reference from rank 0, and yield it, in the model's order. Collective."""
        for index, (name, shape) in enumerate(self.shapes.items()):
            if self.reference is None:
                whole = torch.empty(shape, dtype=torch.float32, device=self.mesh.device)
            else:
                whole = getattr(self.reference, kind)(name).contiguous()
            dist.broadcast(whole, src=0)
            yield index, name, whole

    def _reference_loss_and_norm(self) -> tuple[float, float]:
        """Broadcast the reference's loss and global norm from rank 0. Collective."""
        mine = (0.0, 0.0) if self.reference is None else (self.reference.loss, self.reference.norm)
        both = torch.tensor(mine, dtype=torch.float64, device=self.mesh.device)
        dist.broadcast(both, src=0)
        loss, norm = both.tolist()
        return loss, norm

    def _clip_factor(self, norm: float) -> float:
        """Return the factor by which torch.nn.utils.clip_grad_norm_ scales gradients of a global norm."""
        most = self.trainer.config.gradient_clipping
        return min(1.0, most / (norm + 1e-6)) if most > 0 else 1.0

    # -------------------------------------------------------------------------------------------------- measures

    def _compare(self, kind: str, held: _Pieces, measure: _Measure, tolerance: float) -> TensorComparison:
        differences: list[ParameterDifference] = []
        for index, name, whole in self._broadcast_tensors(kind):
            pieces = held.get(name, [])
            found = [measure(name, number, piece, whole) for number, piece in enumerate(pieces)]
            if found:
                # max() ignores a NaN that is not first: treat NaN as infinite.
                relative = max(inf if isnan(value) else value for value in found)
                factor = _factor(pieces, whole)
                differences.append(
                    ParameterDifference(index, name, relative, factor, self.stage_of.get(name, -1), self.mesh.rank)
                )
        mine = asdict(TensorComparison.of(differences, tolerance))
        ranks = [TypeAdapter(TensorComparison).validate_python(found) for found in gather_json(mine, self.mesh)]
        return TensorComparison.over_ranks(ranks)

    def _relative(self, name: str, number: int, piece: _Piece, whole: Tensor) -> float:
        difference = float(torch.linalg.vector_norm(piece.elements - piece.of(whole)))
        size = float(torch.linalg.vector_norm(whole))
        return difference / size if size else (inf if difference else 0.0)

    def _relative_to_noise(self, name: str, number: int, piece: _Piece, whole: Tensor) -> float:
        difference = float(torch.linalg.vector_norm(piece.elements - piece.of(whole)))
        size = max(float(torch.linalg.vector_norm(whole)), self.noise)
        return difference / size if size else (inf if difference else 0.0)

    def _beyond_the_update(self, name: str, number: int, piece: _Piece, whole: Tensor) -> float:
        optimizer, rate = self.trainer.config.optimizer, self.trainer.engine.learning_rate
        settings = self.trainer.plan.parameter_settings[name]
        expected = nn.Parameter(piece.of(whole).clone())
        if not settings.frozen:
            expected.grad = self.gradients[name][number].elements * self.clip
            group = {"params": [expected], "lr": rate * settings.lr_scale, "weight_decay": settings.weight_decay}
            optimizer.declaration.build([group], optimizer.hyperparameters, self.mesh.device).step()
        moved = expected.detach()
        rounding = 4 * torch.finfo(torch.float32).eps * moved.abs()
        beyond = (piece.elements - moved).abs() - rounding
        return float(beyond.clamp(min=0).max()) / rate

    def _miscounted(self, found: ParityReport) -> str | None:
        """Name the parameter whose share of the global norm equals the norm's error, if any. Only on rank 0."""
        if self.reference is None or found.gradients.differing:
            return None
        off = found.norm**2 - found.reference_norm**2
        shares = dict(self.reference.squares)
        copies = self.mesh.tensor.size - 1
        replicated = sum(shares[name] for name in self.reference.replicated)
        shares["parameters replicated over the tensor ranks"] = copies * replicated
        name = min(shares, key=lambda name: abs(abs(off) - shares[name]))
        if not off or abs(abs(off) - shares[name]) > 0.01 * abs(off):
            return None
        return f"{name} were {'counted more than once' if off > 0 else 'left out'}"


def _by_name(fragments: Iterable[Fragment], kind: str, device: torch.device) -> _Pieces:
    """Divide the flat fragments into pieces of global tensors, without padding."""
    pieces: defaultdict[str, list[_Piece]] = defaultdict(list)
    for fragment in fragments:
        # Tensors that ZeRO offloads to the host are compared on the device, as the reference's tensors are.
        flat = fragment.tensors[kind].detach().to(device)
        for at in fragment.regions(0, fragment.numel):
            pieces[at.name].append(_Piece(flat[at.start : at.start + at.region.numel], at.region))
    return pieces


def _factor(pieces: Iterable[_Piece], whole: Tensor) -> float:
    found = wanted = 0.0
    for piece in pieces:
        expected = piece.of(whole)
        found += float(torch.dot(piece.elements, expected))
        wanted += float(torch.dot(expected, expected))
    return found / wanted if wanted else 1.0
