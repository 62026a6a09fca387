"""The state of the torch engine, for checkpoints: this rank's shares as fragments, and JSON values."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from megalite.checkpoint.fragments import Fragment, TensorSource, fill, saved_window
from megalite.checkpoint.manifest import WEIGHT_KIND
from megalite.fsdp.loss_scale import LossScale
from megalite.fsdp.sharded_stage import Shard
from megalite.model.stage import Stage
from megalite.optim.declaration import OptimizerDeclaration
from megalite.optim.state import create_state, set_updates
from megalite.parallel.mesh import Mesh


class ShardedState:
    """The weights of the engine's stages and the state of its optimizer; see `megalite.training.engine.EngineState`."""

    def __init__(
        self,
        shards: Sequence[tuple[Stage, Shard]],
        optimizer: torch.optim.Optimizer,
        declaration: OptimizerDeclaration,
        loss_scale: LossScale | None,
        mesh: Mesh,
        *,
        divided: bool,
    ) -> None:
        """Take this rank's shares, each with its stage; `divided`: the data ranks have different shares."""
        self._shards, self._optimizer, self._declaration = shards, optimizer, declaration
        self._loss_scale, self._mesh, self._divided = loss_scale, mesh, divided
        self._masters = [s.master for _, s in shards if s.master.requires_grad and s.master.numel()]
        self.updates = 0
        """The number of updates so far, without skipped steps."""

    def fragments(self) -> Iterator[Fragment]:
        """Yield this rank's frozen shares, and those that it updates, with their optimizer state."""
        # First the frozen ones: every data-parallel rank has as many, so that copies have the same number in `parts`.
        for trained in (False, True):
            for _, fragment in self._fragments(trained=trained):
                yield fragment

    def gradients(self) -> Iterator[Fragment]:
        """Yield the trained shares with their ``gradient``, reduced, not clipped yet, times the loss scale."""
        for shard, fragment in self._fragments(trained=True):
            assert shard.gradient is not None
            yield replace(fragment, tensors={"gradient": shard.gradient})

    def _fragments(self, *, trained: bool) -> Iterator[tuple[Shard, Fragment]]:
        create_state(self._optimizer, self._declaration, self._masters)
        for stage, shard in self._shards:
            if shard.master.requires_grad == trained and shard.master.numel():
                yield shard, replace(self._fragment(shard), window=saved_window(stage, shard.placed, self._mesh))

    def _fragment(self, shard: Shard) -> Fragment:
        tensors = {WEIGHT_KIND: shard.master.detach()}
        if shard.master.requires_grad:
            state = self._optimizer.state[shard.master]
            tensors |= {name: state[name] for name in self._declaration.state_tensors}
        sharding = self._mesh.layout.names_of("shard") if self._divided else ()
        copy, copies = self._mesh.copy_of("pipeline", *shard.placed.shards[0].spec.sharding, *sharding)
        return Fragment(shard.placed.shards, shard.placed.shape, shard.start, tensors, copy, copies)

    def restore(self, source: TensorSource, scalar_state: Mapping[str, Any]) -> None:
        """Restore master weights, optimizer state and scalar state; frozen weights stay: they never change."""
        self.updates = int(scalar_state["updates"])
        fill((fragment for _, fragment in self._fragments(trained=True)), source)
        set_updates(self._optimizer, self._declaration, self._masters, self.updates)
        if scalar_state["loss_scale"] is not None and self._loss_scale is not None:
            self._loss_scale.restore(scalar_state["loss_scale"])

    def restore_weights(self, source: TensorSource) -> None:
        """Set the weights alone, of frozen parameters too."""
        for fragment in self.fragments():
            fill([replace(fragment, tensors={WEIGHT_KIND: fragment.tensors[WEIGHT_KIND]})], source)

    @contextmanager
    def preserve_loss_scale(self) -> Iterator[None]:
        """Undo changes of the loss scale by a step inside the context."""
        scale = self._loss_scale
        before = None if scale is None else scale.counters()
        yield
        if scale is not None and before is not None:
            scale.restore(before)

    def scalar_state(self) -> dict[str, Any]:
        """Return the state without tensors, as JSON values: number of updates and loss scale."""
        scale = self._loss_scale
        return {"updates": self.updates, "loss_scale": None if scale is None else scale.counters(), "scheduler": None}
