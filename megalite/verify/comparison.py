"""One step of a layout beside the reference: every rank compares what it holds with the tensors that rank 0 sends.

Four comparisons: the weights before the step, equal to the bit; the loss and the gradient's global norm; the gradients
where ZeRO has put them once they are reduced; the weights after the step. For these last, AdamW's first step moves a
weight by nearly the learning rate in the direction of its gradient's sign, so a gradient that is rounding around zero
may move it either way. Hence the weights are compared with what torch's AdamW makes of the reference's weights with
the gradients and the global norm *as found*, which have been compared with the reference's by then.
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
from megalite.parallel.json_collectives import broadcast_json, gather_json
from megalite.parallel.mesh import joined_mesh, local_device
from megalite.parallel.regions import Region
from megalite.training.plan import Plan
from megalite.training.trainer import Trainer
from megalite.verify.parity_report import (
    GRADIENT_TOLERANCE,
    NOISE_SHARE,
    START_TOLERANCE,
    UPDATE_TOLERANCE,
    Agreement,
    Difference,
    Finding,
)
from megalite.verify.reference import Reference


def verify_layout(plan: Plan, environment: LaunchEnvironment) -> Finding:
    """Be one rank of a plan's layout for its first step, and return what all ranks found. Collective.

    Raises UserError for what the user can mend, FloatingPointError where the gradient is no number.
    """
    timeout = datetime.timedelta(seconds=plan.config.train.timeout_seconds)
    device = local_device(environment.local_rank, environment.launcher)
    # DeepSpeed reads it from the environment, where not every launcher has put it.
    os.environ.setdefault("LOCAL_RANK", str(environment.local_rank))
    with joined_mesh(plan.layout, environment.rank, device=device, timeout=timeout, placement=plan.placement) as mesh:
        datasets = open_datasets(plan.config)
        trainer = Trainer(plan, mesh, datasets)
        reference = Reference(plan, datasets, device, trainer.kernels) if mesh.rank == 0 else None
        finding = compare(trainer, reference)
        trainer.close()
    return finding


def compare(trainer: Trainer, reference: Reference | None) -> Finding:
    """Take a trainer's first step and compare it with `reference`, which rank 0 has. Collective."""
    return _Comparison(trainer, reference).run()


@dataclass(frozen=True, slots=True)
class _Piece:
    """Elements of a global tensor that this rank holds, flat, and the box that they are."""

    elements: Tensor
    region: Region

    def of(self, whole: Tensor) -> Tensor:
        """Return the same elements of a whole tensor, flat."""
        return whole[self.region.slices].reshape(-1)


_Held = Mapping[str, list[_Piece]]
"""What this rank holds of each global tensor, by name."""
_Measure = Callable[[str, int, _Piece, Tensor], float]
"""How far a piece of a tensor, by its name and place among the name's pieces, is from the whole tensor."""


class _Comparison:
    def __init__(self, trainer: Trainer, reference: Reference | None) -> None:
        self.trainer, self.mesh, self.reference = trainer, trainer.mesh, reference
        self.shapes = trainer.plan.requirements.shapes
        self.gradients: _Held = {}
        self.stage_of = {
            shard.spec.name: index
            for index, stage in sorted(trainer.engine.stages.items(), reverse=True)
            for placed in stage.placed_parameters
            for shard in placed.shards
        }

    def run(self) -> Finding:
        missing = self._elements_missing()
        start = self._agreement("weight", self._weights(), self._relative, START_TOLERANCE)
        report = self.trainer.step(1, before_update=self._keep_gradients)
        loss, norm = self._numbers()
        self.noise = NOISE_SHARE * norm
        gradients = self._agreement("gradient", self.gradients, self._relative_to_noise, GRADIENT_TOLERANCE)
        self.clip = self._clipping(report.outcome.grad_norm)
        update = self._agreement("weight", self._weights(), self._beyond_the_update, UPDATE_TOLERANCE)
        found = Finding(
            parameters=len(self.shapes),
            elements_missing=missing,
            loss=report.loss,
            reference_loss=loss,
            # Replicas whose gradients were not averaged each have a norm of their own.
            norm=max(gather_json(report.outcome.grad_norm, self.mesh), key=lambda found: abs(found - norm)),
            reference_norm=norm,
            start=start,
            gradients=gradients,
            update=update,
        )
        return replace(found, miscounted=broadcast_json(self._miscounted(found), self.mesh))

    # ------------------------------------------------------------------------------------------ what this rank holds

    def _weights(self) -> _Held:
        return _by_name(self.trainer.state.fragments(), "weight", self.mesh.device)

    def _keep_gradients(self) -> None:
        # Copies: the step clips in place.
        held = _by_name(self.trainer.state.gradients(), "gradient", self.mesh.device)
        self.gradients = {
            name: [_Piece(piece.elements.clone(), piece.region) for piece in pieces] for name, pieces in held.items()
        }

    def _elements_missing(self) -> int:
        """Elements of the model less those that the ranks update, each counted once as a checkpoint counts it."""
        mine = sum(
            at.region.numel
            for number, fragment in enumerate(self.trainer.state.fragments())
            for at in fragment.regions(*fragment.share(number))
        )
        held = torch.tensor(mine, dtype=torch.int64, device=self.mesh.device)
        dist.all_reduce(held)
        return sum(map(prod, self.shapes.values())) - int(held)

    # --------------------------------------------------------------------------------------------- the reference's

    def _tensors(self, kind: str) -> Iterator[tuple[int, str, Tensor]]:
        """Yield each global tensor of the reference, one after the other on every rank, in the model's order."""
        for index, (name, shape) in enumerate(self.shapes.items()):
            if self.reference is None:
                whole = torch.empty(shape, dtype=torch.float32, device=self.mesh.device)
            else:
                whole = getattr(self.reference, kind)(name).contiguous()
            dist.broadcast(whole, src=0)
            yield index, name, whole

    def _numbers(self) -> tuple[float, float]:
        """Return the reference's loss and global norm."""
        mine = (0.0, 0.0) if self.reference is None else (self.reference.loss, self.reference.norm)
        both = torch.tensor(mine, dtype=torch.float64, device=self.mesh.device)
        dist.broadcast(both, src=0)
        loss, norm = both.tolist()
        return loss, norm

    def _clipping(self, norm: float) -> float:
        """What clipping multiplies gradients of a norm by, as torch.nn.utils.clip_grad_norm_ has it."""
        most = self.trainer.config.gradient_clipping
        return min(1.0, most / (norm + 1e-6)) if most > 0 else 1.0

    # -------------------------------------------------------------------------------------------------- measures

    def _agreement(self, kind: str, held: _Held, measure: _Measure, tolerance: float) -> Agreement:
        differences: list[Difference] = []
        for index, name, whole in self._tensors(kind):
            pieces = held.get(name, [])
            found = [measure(name, number, piece, whole) for number, piece in enumerate(pieces)]
            if found:
                # Nothing is larger than a NaN, nor smaller.
                relative = max(inf if isnan(value) else value for value in found)
                factor = _factor(pieces, whole)
                differences.append(
                    Difference(index, name, relative, factor, self.stage_of.get(name, -1), self.mesh.rank)
                )
        mine = asdict(Agreement.of(differences, tolerance))
        ranks = [TypeAdapter(Agreement).validate_python(found) for found in gather_json(mine, self.mesh)]
        return Agreement.over_ranks(ranks)

    def _relative(self, name: str, number: int, piece: _Piece, whole: Tensor) -> float:
        difference = float(torch.linalg.vector_norm(piece.elements - piece.of(whole)))
        size = float(torch.linalg.vector_norm(whole))
        return difference / size if size else (inf if difference else 0.0)

    def _relative_to_noise(self, name: str, number: int, piece: _Piece, whole: Tensor) -> float:
        difference = float(torch.linalg.vector_norm(piece.elements - piece.of(whole)))
        size = max(float(torch.linalg.vector_norm(whole)), self.noise)
        return difference / size if size else (inf if difference else 0.0)

    def _beyond_the_update(self, name: str, number: int, piece: _Piece, whole: Tensor) -> float:
        settings = self.trainer.config.optimizer
        expected = nn.Parameter(piece.of(whole).clone())
        expected.grad = self.gradients[name][number].elements * self.clip
        decay = settings.weight_decay if whole.ndim > 1 else 0.0
        rate = self.trainer.engine.learning_rate
        torch.optim.AdamW([expected], lr=rate, betas=settings.betas, eps=settings.eps, weight_decay=decay).step()
        moved = expected.detach()
        rounding = 4 * torch.finfo(torch.float32).eps * moved.abs()
        beyond = (piece.elements - moved).abs() - rounding
        return float(beyond.clamp(min=0).max()) / rate

    def _miscounted(self, found: Finding) -> str | None:
        """Name the parameter whose share of the global norm is what the norm is off by. For rank 0."""
        if self.reference is None or found.gradients.differing:
            return None
        off = found.norm**2 - found.reference_norm**2
        shares = dict(self.reference.squares)
        copies = self.mesh.tensor.size - 1
        shares["what every tensor rank holds whole"] = copies * sum(shares[name] for name in self.reference.replicated)
        name = min(shares, key=lambda name: abs(abs(off) - shares[name]))
        if not off or abs(abs(off) - shares[name]) > 0.01 * abs(off):
            return None
        return f"{name} were {'counted more than once' if off > 0 else 'left out'}"


def _by_name(fragments: Iterable[Fragment], kind: str, device: torch.device) -> _Held:
    """Cut the flat fragments into pieces of global tensors; padding belongs to none."""
    held: defaultdict[str, list[_Piece]] = defaultdict(list)
    for fragment in fragments:
        # What ZeRO keeps on the host is compared on the device, where the reference's tensors come.
        flat = fragment.tensors[kind].detach().to(device)
        for at in fragment.regions(0, fragment.numel):
            held[at.name].append(_Piece(flat[at.start : at.start + at.region.numel], at.region))
    return held


def _factor(pieces: Iterable[_Piece], whole: Tensor) -> float:
    found = wanted = 0.0
    for piece in pieces:
        expected = piece.of(whole)
        found += float(torch.dot(piece.elements, expected))
        wanted += float(torch.dot(expected, expected))
    return found / wanted if wanted else 1.0
