"""All that can be known of a run before a rank starts: its configuration, layout and data, checked against each other.

`prepare` is what every launcher goes through first, and all that ``megalite train --dry-run`` does. It forms no
process group and needs no accelerator, so that mistakes end a run in a second.
"""

import json
from collections.abc import Sequence
from ctypes.util import find_library
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from importlib.metadata import version
from math import prod
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table

from megalite.checkpoint.manifest import Manifest
from megalite.checkpoint.reader import CheckpointReader
from megalite.checkpoint.selection import CHECKPOINTS, Expectation, candidates
from megalite.checkpoint.shapes import weight_shapes
from megalite.checkpoint.weights import open_weights
from megalite.config import ModelConfig, RunConfig, load_run_config
from megalite.data.batches import BatchSchedule
from megalite.data.datasets import Datasets, open_datasets
from megalite.data.indexed import IndexedDataset
from megalite.data.tokenizer import load_tokenizer, standard_name, tokenizer_file
from megalite.errors import UserError
from megalite.layout import Coordinate, ParallelLayout
from megalite.pipeline.partition import partition
from megalite.pipeline.placement import Placement
from megalite.pipeline.schedule import SCHEDULES, all_streams
from megalite.pipeline.simulate import simulate
from megalite.run_folder import require_run_folder

CONFIG = "config.yaml"
"""The resolved run file in a checkpoint."""


@dataclass(frozen=True)
class Plan:
    """A run that can start: a resolved configuration whose parts fit each other and the data on disk."""

    config: RunConfig
    layout: ParallelLayout
    placement: Placement
    stage_layers: tuple[range, ...]
    """The layers of every stage."""
    tokenizer_digest: str | None = None

    def check_data(self, *, keep_index: bool = True) -> Datasets:
        """Open the data as the ranks will; raise UserError where it is missing, broken, too little or of another
        vocabulary, or where nothing can be written in `run.dir`."""
        self.check_machine()
        vocab_size, path, digest = self.config.model.vocab_size, self.config.data.tokenizer, self.tokenizer_digest
        assert vocab_size is not None
        for source in (*self.config.data.train, *self.config.data.valid):
            indexed = IndexedDataset(source.prefix)
            indexed.require_vocabulary(vocab_size)
            indexed.require_sound_mask()
            if digest and indexed.sidecar and indexed.sidecar.tokenizer_sha256 != digest:
                raise UserError(
                    f"{source.prefix}.json: made with a tokenizer of SHA-256 {indexed.sidecar.tokenizer_sha256[:12]}, "
                    f"not with data.tokenizer={path} ({digest[:12]}); preprocess again, or name the other tokenizer"
                )
        return open_datasets(self.config, keep_index=keep_index)

    @cached_property
    def expectation(self) -> Expectation:
        """What a checkpoint must hold for this run."""
        return Expectation(self.config.model, weight_shapes(self.config.model), self.tokenizer_digest)

    @property
    def order_digest(self) -> str:
        """SHA-256 of all that the order of samples follows from."""
        data = self.config.data.model_dump(mode="json", exclude={"tokenizer", "valid", "prefetch", "index_cache"})
        return sha256(json.dumps([self.config.run.seed, data], sort_keys=True).encode()).hexdigest()

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of a checkpoint's tensors: of every weight its master and two moments, in fp32."""
        return 12 * sum(map(prod, self.expectation.shapes.values()))

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.config.run.dir / CHECKPOINTS

    def manifest(self, step: int) -> Manifest:
        """Return what a checkpoint of this run says of itself."""
        return Manifest(
            step,
            {},
            {},
            versions={name: version(name) for name in ("megalite", "torch", "deepspeed")},
            layout=f"{self.layout}, ZeRO-{self.config.zero_stage}, {self.config.precision}",
            model=self.config.model.model_dump(mode="json"),
            precision=self.config.precision,
            config_sha256=sha256(self.config.to_yaml().encode()).hexdigest(),
            tokenizer_sha256=self.tokenizer_digest,
        )

    def companion_files(self) -> dict[str, bytes]:
        """Return the small files that a checkpoint has with it: the resolved run file and the tokenizer."""
        files = {CONFIG: self.config.to_yaml().encode()}
        if self.config.data.tokenizer is not None:
            tokenizer = tokenizer_file(self.config.data.tokenizer)
            files[standard_name(tokenizer)] = tokenizer.read_bytes()
        return files

    def check_machine(self) -> None:
        """Raise UserError where this host lacks what the run takes: a run.dir to write in, libraries. Every host's own
        matter, and quickly seen; `check_start` and `check_data` begin with it."""
        require_run_folder(self.config.run.dir)
        if (sections := self.config.deepspeed.on_nvme) and find_library("aio") is None:
            raise UserError(
                f"deepspeed.zero_optimization.{sections[0]}.device='nvme' needs libaio, which this machine has not; "
                "install it (apt install libaio-dev, or dnf install libaio-devel), or write 'cpu'"
            )

    def check_start(self) -> str:
        """Return a line on where the run will begin; raise UserError where that is not of this run's model.

        Whether the files are whole the ranks look at together. Also raised where the machine lacks what it takes.
        """
        self.check_machine()
        for folder in candidates(self.config):
            try:
                reader = CheckpointReader(folder)
            except UserError:
                if self.config.resume != "auto":
                    raise
                continue
            self.expectation.require_resumable(reader)
            return f"start: from {folder}, step {reader.manifest.step:,}, if it is whole"
        if self.config.init_from is None:
            return "start: anew"
        self.expectation.require_weights(open_weights(self.config.init_from))
        return f"start: with the weights of {self.config.init_from}"

    def describe(self) -> RenderableType:
        """Return the rank map, the parameters of every rank and the simulated pipeline, for the console."""
        return Group(self._summary(), self._rank_map(), self._pipeline())

    def _summary(self) -> str:
        config, train = self.config, self.config.train
        tokens = BatchSchedule(train).consumed(train.steps) * config.data.sequence_length
        ramp = train.batch_size_rampup
        sizes = f"{train.global_batch_size:,}" if ramp is None else f"{ramp.start:,} to {train.global_batch_size:,}"
        return (
            f"{config.source.name}: {config.model.architecture}, {self.layout}, {self.layout.world_size} ranks, "
            f"ZeRO-{config.zero_stage}, {config.precision}\n"
            f"{train.steps:,} steps x {sizes} sequences x {config.data.sequence_length:,} tokens "
            f"= {tokens:,} tokens; {config.gradient_accumulation_steps} microbatches of "
            f"{train.micro_batch_size} a rank and step"
        )

    def _rank_map(self) -> Table:
        table = Table(title="ranks", title_justify="left")
        counted = "parameters a rank" if self.placement.virtual_stages == 1 else "parameters of the stage"
        for column in ("stage", "layers", "tensor", "ranks (data 0, 1, ...)", counted):
            table.add_column(column, justify="right")
        total = 0
        for stage, layers in enumerate(self.stage_layers):
            for tensor in range(self.layout.tensor):
                pipeline = self.placement.rank_of(stage)
                ranks = [
                    self.layout.rank(Coordinate(pipeline=pipeline, data=data, tensor=tensor))
                    for data in range(self.layout.data)
                ]
                shown = ", ".join(map(str, ranks if len(ranks) <= 8 else [*ranks[:4], "...", ranks[-1]]))
                held = self.parameters(stage, tensor)
                total += held
                table.add_row(str(stage), f"{layers.start}-{layers.stop - 1}", str(tensor), shown, f"{held:,}")
        whole = range(self.config.model.num_hidden_layers)
        model = _num_parameters(self.config.model, whole, 0, 1, (0, 1))
        table.caption = (
            f"{model:,} parameters in the model, {total:,} on its ranks\n(norms and tied tables stand on several)"
        )
        return table

    def parameters(self, stage: int, tensor: int) -> int:
        """Number of parameters that one rank holds of a stage, before ZeRO divides them."""
        size, layers, num_stages = (tensor, self.layout.tensor), self.stage_layers[stage], self.placement.num_stages
        shares = stage == num_stages - 1 > 0 and self.placement.rank_of(0) == self.placement.rank_of(stage)
        return _num_parameters(self.config.model, layers, stage, num_stages, size, shares_rank=shares)

    def _pipeline(self) -> str:
        schedule, microbatches = self.config.parallel.schedule, self.config.gradient_accumulation_steps
        if self.layout.pipeline == 1:
            return "no pipeline: every rank runs all layers"
        timeline = simulate(all_streams(SCHEDULES[schedule], self.placement, microbatches))
        stages = f"{self.placement.num_stages} stages"
        if self.placement.virtual_stages > 1:
            stages += f", {self.placement.virtual_stages} a rank"
        return (
            f"pipeline {schedule}: {stages}, {microbatches} microbatches, simulated bubble "
            f"{timeline.bubble_fraction:.1%}, at most {max(timeline.peak_microbatches):g} microbatches in flight"
        )


def _num_parameters(
    model: ModelConfig,
    layers: range,
    index: int,
    num_stages: int,
    tensor_rank_and_size: tuple[int, int],
    *,
    shares_rank: bool = False,
) -> int:
    """Number of parameters of a stage on a rank; of the last stage without a tied table that its rank has already."""
    import torch

    from megalite.model.stage import Stage
    from megalite.tensor_parallel.collectives import TensorGroup

    with torch.device("meta"):
        group = TensorGroup(*tensor_rank_and_size)
        first = Stage(model, (), index=0, num_stages=num_stages, group=group) if shares_rank else None
        table = first.tied_table if first is not None else None
        return Stage(model, layers, index=index, num_stages=num_stages, group=group, table=table).num_parameters()


def prepare(path: Path, overrides: Sequence[str], world_size: int | None) -> Plan:
    """Read a run file and resolve it; raise UserError for what cannot work. `Plan.check_data` looks at the data.

    `world_size` is the number of ranks that a launcher started, None where megalite will start them itself.
    """
    config = load_run_config(path, overrides)
    tokenizer = load_tokenizer(config.data.tokenizer) if config.data.tokenizer is not None else None
    config = config.resolve(world_size=world_size, vocab_size=tokenizer.vocab_size if tokenizer else None)
    return plan_of(config, tokenizer.digest if tokenizer else None)


def plan_of(config: RunConfig, tokenizer_digest: str | None) -> Plan:
    """Return the plan of a configuration that `RunConfig.resolve` has completed and checked."""
    stages = config.placement
    return Plan(
        config=config,
        layout=config.layout,
        placement=stages,
        stage_layers=partition(config.model.num_hidden_layers, stages.num_stages, config.parallel.stage_layers),
        tokenizer_digest=tokenizer_digest,
    )
