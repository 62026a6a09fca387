"""The plan of a run, before any rank starts: its configuration, layout, data and start, checked against each other.

Every launcher calls `prepare` first, and ``megalite train --dry-run`` does nothing else. It forms no process group and
needs no accelerator, so that configuration errors are reported within a second.
"""

from collections.abc import Sequence
from ctypes.util import find_library
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table

from megalite.checkpoint import forecast
from megalite.checkpoint.compatibility import CheckpointRequirements
from megalite.checkpoint.discovery import CHECKPOINTS, resume_candidates
from megalite.checkpoint.manifest import Manifest, OptimizerRecord
from megalite.checkpoint.model_files import (
    GENERATION_CONFIG,
    read_settings,
    require_readable,
    run_model_files,
    tokenizer_model_files,
    tokenizer_name,
)
from megalite.checkpoint.reader import CheckpointReader
from megalite.checkpoint.special_tokens import DocumentTokens, declared_end_ids
from megalite.checkpoint.weights import CheckpointWeights, document_tokens
from megalite.config import ModelConfig, RunConfig, load_run_config
from megalite.config.hub_names import hub_hint
from megalite.config.validation import Fault, report
from megalite.data.batch_schedule import BatchSchedule
from megalite.data.datasets import Datasets, open_datasets
from megalite.data.indexed.dataset import IndexedDataset
from megalite.data.indexed.format import DatasetSidecar, with_suffix
from megalite.data.order.digest import order_digest
from megalite.data.tokenizers.base import Tokenizer
from megalite.data.tokenizers.load import load_tokenizer, standard_files, tokenizer_file
from megalite.errors import UserError
from megalite.model.shapes import weight_shapes
from megalite.model.weights import Weights
from megalite.monitoring.run_folder import require_run_folder
from megalite.optim.parameter_groups import ParameterSettings, parameter_settings, rule_faults, unequal_parts
from megalite.parallel.layout import ParallelLayout, format_ranges
from megalite.parallel.placement import Placement
from megalite.pipeline.partition import partition
from megalite.pipeline.schedules import SCHEDULES, all_streams
from megalite.pipeline.timeline.simulator import simulate
from megalite.training.memory_estimate import rank_bytes, unit_for

if TYPE_CHECKING:
    from megalite.model.stage import Stage

CONFIG = "config.yaml"
"""The resolved run file in a checkpoint."""


_LISTED = 4
"""The rank map lists up to this many pipeline ranks one by one; of more, equal ranks share a row."""


@dataclass(frozen=True, slots=True)
class _Row:
    """A row of the rank map: ranks with the same number of layers and parameters, `trained` of them not frozen."""

    ranks: tuple[int, ...]
    layers: str
    parameters: int
    trained: int


@dataclass(frozen=True)
class Plan:
    """A run that can start: a resolved configuration whose parts fit each other and the data on disk."""

    config: RunConfig
    layout: ParallelLayout
    placement: Placement
    stage_layers: tuple[range, ...]
    """The layers of every stage."""
    tokenizer_digest: str | None = None
    unchecked: tuple[str, ...] = ()
    """Files that a dry run could not check, since they do not exist yet; a line each."""
    _counted: dict[tuple[object, ...], tuple[int, int]] = field(default_factory=dict, repr=False, compare=False)

    def check_data(self, *, keep_index: bool = True) -> Datasets:
        """Open the data as the ranks will.

        Raises UserError where data is missing, damaged, not enough or of another vocabulary, or where `run.dir` is not
        writable.
        """
        self.check_machine()
        for source in (*self.config.data.train, *self.config.data.valid):
            self.check_source(source.prefix)
        return open_datasets(self.config, keep_index=keep_index)

    def check_source(self, prefix: Path) -> None:
        """Raise UserError where a dataset is missing, damaged, or of another vocabulary."""
        vocab_size, path, digest = self.config.model.vocab_size, self.config.data.tokenizer, self.tokenizer_digest
        assert vocab_size is not None
        indexed = IndexedDataset(prefix)
        indexed.require_vocabulary(vocab_size)
        indexed.require_sound_mask()
        if digest and indexed.sidecar and indexed.sidecar.tokenizer_sha256 != digest:
            raise UserError(
                f"{prefix}.json: made with a tokenizer of SHA-256 {indexed.sidecar.tokenizer_sha256[:12]}, "
                f"not with data.tokenizer={path} ({digest[:12]}); preprocess again, or name the other tokenizer"
            )

    @property
    def data_is_present(self) -> bool:
        """Whether every training source has at least one of its files."""
        return not any(_is_absent(source.prefix) for source in self.config.data.train)

    def check_present_data(self) -> tuple[Datasets | None, list[str]]:
        """Check the data that exists, as `check_data` does, without writing an index, for a dry run.

        Returns the datasets, None where a training source is absent, and a line for each absent source. A source with
        only some of its files is damaged, not absent. Raises UserError as `check_data` does.
        """
        data = self.config.data
        absent = {source.prefix for source in (*data.train, *data.valid) if _is_absent(source.prefix)}
        present = data.model_copy(
            update={
                "train": tuple(source for source in data.train if source.prefix not in absent),
                "valid": tuple(source for source in data.valid if source.prefix not in absent),
                # Without a tokenizer the special tokens of fill-in-the-middle are unknown.
                **({"fim_rate": 0.0} if self.unchecked else {}),
            }
        )
        lines = [f"not checked: {prefix}: neither {prefix}.idx nor {prefix}.bin is there" for prefix in sorted(absent)]
        plan = replace(self, config=self.config.model_copy(update={"data": present}))
        if len(present.train) == len(data.train):
            return plan.check_data(keep_index=False), lines
        self.check_machine()
        for source in (*present.train, *present.valid):
            self.check_source(source.prefix)
        return None, lines

    @cached_property
    def requirements(self) -> CheckpointRequirements:
        """The requirements of this run on a checkpoint."""
        return CheckpointRequirements(
            self.config.model,
            self.shapes,
            self.tokenizer_digest,
            self.config.optimizer.declaration,
            self.frozen,
        )

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The global shapes of the model's weights, by name."""
        return weight_shapes(self.config.model)

    @cached_property
    def parameter_settings(self) -> dict[str, ParameterSettings]:
        """How each parameter of the model is trained, by global name in the order of the model."""
        optimizer = self.config.optimizer
        return parameter_settings(self.shapes, optimizer.groups, optimizer.weight_decay)

    @cached_property
    def frozen(self) -> frozenset[str]:
        """The global names of the parameters that are not trained."""
        return frozenset(name for name, settings in self.parameter_settings.items() if settings.frozen)

    @cached_property
    def order_digest(self) -> str:
        """SHA-256 of everything that determines the sample order; raises UserError where the data is missing."""
        return order_digest(self.config)

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of a checkpoint's tensors: every weight, and the optimizer state of those that are trained, in fp32."""
        trained = sum(prod(shape) for name, shape in self.shapes.items() if name not in self.frozen)
        state_tensors = self.config.optimizer.declaration.state_tensors
        return 4 * (sum(map(prod, self.shapes.values())) + len(state_tensors) * trained)

    def describe_checkpoints(self) -> str:
        """Return a line on the checkpoints that the run will keep, and their size."""
        return forecast.describe(self.config, self.checkpoint_bytes)

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.config.run.dir / CHECKPOINTS

    def manifest(self, step: int) -> Manifest:
        """Return the manifest of a checkpoint of this run, without its tensors and files."""
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
            documents=self.documents,
            optimizer=OptimizerRecord(
                self.config.optimizer.name,
                self.config.optimizer.declaration.state_tensors,
                self.config.optimizer.model_dump(mode="json", exclude={"name"}, exclude_none=True),
            ),
        )

    def companion_files(self) -> dict[str, bytes]:
        """Return the small files of every checkpoint: the resolved run file, and byte for byte the files of the
        tokenizer and the generation settings, from `data.tokenizer` and `init_from`."""
        weights, of_weights = self._first_weights, {}
        if weights is not None:
            from megalite.convert.generation_config import model_file_contents  # with the readers of foreign formats

            of_weights = model_file_contents(weights, weights.model_files)
        tokenizer, standard = None, {}
        if self.config.data.tokenizer is not None:
            file = tokenizer_file(self.config.data.tokenizer)
            standard = standard_files(self.config.data.tokenizer)
            tokenizer = tokenizer_model_files(file, next(iter(standard)))
        elif (name := tokenizer_name(of_weights)) and (digests := {one.tokenizer_sha256 for one in self._sidecars}):
            # The tokenizer of the weights is that of the run, unless the data was made with another tokenizer.
            of_weights = of_weights if digests == {sha256(of_weights[name]).hexdigest()} else {}
        return run_model_files(tokenizer, of_weights) | standard | {CONFIG: self.config.to_yaml().encode()}

    @cached_property
    def documents(self) -> DocumentTokens:
        """The end and beginning tokens of documents, from the training data and the weights of `init_from`.

        The weights may have been trained with further end tokens, and with a token before every text.
        """
        ends = [one.eod_id for one in self._sidecars if one.eod_id is not None]
        begins = [one for one in (getattr(sidecar, "bos_id", None) for sidecar in self._sidecars) if one is not None]
        before = document_tokens(self._first_weights) if self._first_weights else None
        if isinstance(self._first_weights, CheckpointWeights) and self.tokenizer_digest is not None:
            theirs = self._first_weights.reader.manifest.tokenizer_sha256
            before = before if theirs in (None, self.tokenizer_digest) else None  # its ids are other tokens here
        beginning: tuple[int, ...] | None = tuple(begins[:1])
        if not beginning and self._first_weights:
            beginning = before.beginning if before is not None else None
        elif not beginning and not self._sidecars:
            beginning = None
        return DocumentTokens(tuple(dict.fromkeys([*ends, *(before.ends if before is not None else ())])), beginning)

    @cached_property
    def _first_weights(self) -> Weights | None:
        """The weights of `init_from`; raises UserError where it has none, even if a checkpoint takes precedence."""
        if self.config.init_from is None:
            return None
        from megalite.convert.open import open_weights  # with the readers of foreign formats

        try:
            return open_weights(self.config.init_from)
        except UserError as error:
            raise UserError(f"init_from={error}") from error

    @cached_property
    def _sidecars(self) -> list[DatasetSidecar]:
        """The sidecar files of the training data, of those sources that have one."""
        found = [IndexedDataset(source.prefix).sidecar for source in self.config.data.train]
        return [sidecar for sidecar in found if sidecar is not None]

    def check_machine(self) -> None:
        """Raise UserError where this host lacks a requirement of the run: a writable run.dir, or a library.

        A quick check for every host; `check_start` and `check_data` begin with it.
        """
        require_run_folder(self.config.run.dir)
        if (sections := self.config.deepspeed.on_nvme) and find_library("aio") is None:
            raise UserError(
                f"deepspeed.zero_optimization.{sections[0]}.device='nvme' needs libaio, which this machine does not "
                "have; install it (apt install libaio-dev, or dnf install libaio-devel), or write 'cpu'"
            )

    def check_start(self) -> str:
        """Return a line on where the run will begin; raise UserError where that is not of this run's model.

        Whether the files are whole the ranks look at together. Also raised where the machine lacks what it takes, and
        where a file that goes into every checkpoint is of no use to `generate` and `convert`.
        """
        self.check_machine()
        start = self._where_it_begins()
        self._require_readable_model_files()
        return start

    def _where_it_begins(self) -> str:
        weights = self._first_weights
        for folder in resume_candidates(self.config):
            try:
                reader = CheckpointReader(folder)
            except UserError:
                if self.config.resume != "auto":
                    raise
                continue
            self.requirements.require_resumable(reader)
            passed_over = f"; {self.init_from_ignored}" if weights is not None else ""
            return f"start: from {folder}, step {reader.manifest.step:,}, if it is whole{passed_over}"
        if weights is None:
            return "start: anew"
        self.requirements.require_weights(weights)
        return f"start: with the weights of {self.config.init_from}"

    def _require_readable_model_files(self) -> None:
        """Check the files of `data.tokenizer` and `init_from` that `model_files` puts together."""
        weights, of_weights, vocab_size = self._first_weights, {}, self.config.model.vocab_size
        assert vocab_size is not None
        if weights is not None:
            from megalite.convert.generation_config import generation_settings  # with the readers of foreign formats

            of_weights = weights.model_files
            settings, where = generation_settings(weights, of_weights)
            declared_end_ids(settings, vocab_size, where)
        beside = self._files_beside_the_tokenizer()
        if GENERATION_CONFIG not in of_weights and (path := beside.get(GENERATION_CONFIG)) is not None:
            declared_end_ids(read_settings(path), vocab_size, str(path))
        for name, path in {**of_weights, **beside}.items():
            if name != GENERATION_CONFIG:  # which was read
                require_readable(name, path)

    def _files_beside_the_tokenizer(self) -> dict[str, Path]:
        """Return the files that belong to `data.tokenizer`, without the tokenizer's own file, which was opened."""
        if self.config.data.tokenizer is None or self.tokenizer_digest is None:
            return {}
        name = next(iter(standard_files(self.config.data.tokenizer)))
        found = tokenizer_model_files(tokenizer_file(self.config.data.tokenizer), name)
        return {other: path for other, path in found.items() if other != name}

    @property
    def init_from_ignored(self) -> str:
        """The line about `init_from` where the run resumes from a checkpoint instead."""
        return (
            f"init_from={self.config.init_from} is ignored, since the run resumes from a checkpoint; to start from "
            "those weights, set another run.dir, or resume=never"
        )

    def describe(self) -> RenderableType:
        """Return the summary, the rank map with parameters and memory, and the simulated pipeline, for the console."""
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
            f"= {tokens:,} tokens; {config.gradient_accumulation_steps:,} microbatches of "
            f"{_sequences(train.micro_batch_size)} per rank and step"
        )

    def _rank_map(self) -> Table:
        rows = [(row, rank_bytes(self.config, row.parameters, row.trained)) for row in self._rows()]
        unit, size = unit_for(max(held.total for _, held in rows))
        table = Table(title=f"what a rank holds, in {unit}", title_justify="left", box=None, padding=(0, 1, 0, 0))
        left = ("ranks", "stages: layers")
        for column in (*left, "parameters", "weights", "gradients", "reduction", "optimizer", "sum"):
            table.add_column(column, justify="left" if column in left else "right", no_wrap=column not in left)
        for row, held in rows:
            sizes = held.weights, held.gradients, held.reduction, held.optimizer, held.total
            shown = [f"{number / size:,.2f}" for number in sizes]
            table.add_row(format_ranges(row.ranks), row.layers, f"{row.parameters / 1e6:,.1f} M", *shown)
        total = sum(map(self.parameters_of_rank, self._one_copy)) * self.layout.group_size("gradient")
        frozen = sum(prod(self.shapes[name]) for name in self.frozen)
        notes = [
            f"{sum(map(prod, self.shapes.values())):,} parameters in the model, {total:,} on its ranks",
            "(norms, tied tables and replicas stand on several)",
            *([f"{frozen:,} parameters of the model are frozen"] if frozen else []),
            "bytes by arithmetic, without activations and what the device's libraries take",
        ]
        if offloaded := max(held.offloaded for _, held in rows):
            notes.append(f"off the device: up to {offloaded / size:,.2f} {unit} more for each rank")
        table.caption = "\n".join(notes)
        table.caption_justify = "left"
        return table

    @property
    def _one_copy(self) -> tuple[int, ...]:
        """The ranks that together hold one copy of the model."""
        return self.layout.groups_by("model")[0]

    def _rows(self) -> list["_Row"]:
        """Group ranks with the same layers and number of parameters into rows of the rank map."""
        rows: list[_Row] = []
        copies = {ranks[0]: ranks for ranks in self.layout.groups_by("gradient")}
        for first in self._one_copy:
            ranks = copies[first]
            stages = [(stage, self.stage_layers[stage]) for stage in self._stages_of(first)]
            numbers = ", ".join(str(stage) for stage, _ in stages)
            layers = f"{numbers}: {', '.join(f'{layers.start}-{layers.stop - 1}' for _, layers in stages)}"
            if self.layout.size("pipeline") > _LISTED:
                layers = f"{' + '.join(str(len(layers)) for _, layers in stages)} layers"
            counts = [self.parameters_of_rank(first, trained=trained) for trained in (False, True)]
            row = _Row(ranks, layers, *counts)
            alike = [at for at, other in enumerate(rows) if replace(other, ranks=ranks) == row]
            if alike:
                rows[alike[0]] = replace(row, ranks=tuple(sorted((*rows[alike[0]].ranks, *ranks))))
            else:
                rows.append(row)
        return rows

    def parameters_of_rank(self, rank: int, *, trained: bool = False) -> int:
        """Return the number of parameters of all stages of a rank, as `parameters` counts them."""
        tensor = self.layout.index(rank, "tensor")
        return sum(self.parameters(stage, tensor, trained=trained) for stage in self._stages_of(rank))

    def _stages_of(self, rank: int) -> tuple[int, ...]:
        return self.placement.stages_of(self.layout.index(rank, "pipeline"))

    def parameters(self, stage: int, tensor: int, *, trained: bool = False) -> int:
        """Return the number of parameters that one rank holds of a stage, before ZeRO partitions them.

        With `trained` frozen parameters are left out.
        """
        layers, last = self.stage_layers[stage], self.placement.num_stages - 1
        # All middle stages with the same number of layers are equally large unless some are frozen: cache the count.
        kind = (layers if self.frozen else len(layers), stage == 0, stage == last, tensor)
        if kind not in self._counted:
            shares = stage == last > 0 and self.placement.rank_of(0) == self.placement.rank_of(stage)
            built = _meta_stage(
                self.config.model, layers, stage, last + 1, (tensor, self.layout.size("tensor")), shares
            )
            self._counted[kind] = built.num_parameters(), built.num_parameters(without=self.frozen)
        every, not_frozen = self._counted[kind]
        return not_frozen if trained else every

    def _pipeline(self) -> str:
        schedule, microbatches = self.config.parallel.schedule, self.config.gradient_accumulation_steps
        if self.layout.size("pipeline") == 1:
            return "no pipeline: every rank runs all layers"
        timeline = simulate(all_streams(SCHEDULES[schedule], self.placement, microbatches))
        stages = f"{self.placement.num_stages} stages"
        if self.placement.virtual_stages > 1:
            stages += f", {self.placement.virtual_stages} per rank"
        return (
            f"pipeline {schedule}: {stages}, {microbatches} microbatches, simulated bubble "
            f"{timeline.bubble_fraction:.1%}, at most {max(timeline.peak_microbatches):g} microbatches in flight"
        )


def _sequences(count: int) -> str:
    return "1 sequence" if count == 1 else f"{count} sequences"


def _meta_stage(
    model: ModelConfig,
    layers: range,
    index: int,
    num_stages: int,
    tensor_rank_and_size: tuple[int, int],
    shares_rank: bool = False,
) -> "Stage":
    """Return a stage without memory for its parameters; with `shares_rank` without a tied table that it shares."""
    import torch

    from megalite.model.stage import Stage
    from megalite.parallel.tensor_group import TensorGroup

    with torch.device("meta"):
        group = TensorGroup(*tensor_rank_and_size)
        first = Stage(model, (), index=0, num_stages=num_stages, group=group) if shares_rank else None
        table = first.tied_table if first is not None else None
        return Stage(model, layers, index=index, num_stages=num_stages, group=group, table=table)


def _check_parameter_groups(plan: Plan) -> None:
    """Raise UserError for parameter groups without effect, and for those that divide one tensor of the training."""
    groups, key = plan.config.optimizer.groups, ("train", "optimizer", "groups")
    if not groups:
        return
    model, origin = plan.config.model, plan.config.origin
    faults = [
        Fault((*key, number, "match"), f"={groups[number].match!r}{text}")
        for number, text in rule_faults(plan.shapes, groups)
    ]
    report([origin.line(fault) for fault in faults])
    whole = _meta_stage(model, range(model.num_hidden_layers), 0, 1, (0, plan.layout.size("tensor")))
    parts = [tuple(shard.spec.name for shard in placed.shards) for placed in whole.placed_parameters]
    if unequal := unequal_parts(parts, plan.parameter_settings):
        text = f": {unequal[0]} and {unequal[1]} are parts of one matrix in training, and have different settings; "
        report([origin.line(Fault(key, f"{text}match both of them, or none"))])


def _is_absent(prefix: Path) -> bool:
    return not any(with_suffix(prefix, suffix).exists() for suffix in (".idx", ".bin"))


def prepare(
    path: Path, overrides: Sequence[str], world_size: int | None, *, tokenizer_may_be_absent: bool = False
) -> Plan:
    """Read a run file and resolve it; raise UserError for what cannot work. `Plan.check_data` looks at the data.

    `world_size` is the number of ranks that a launcher started, None where megalite will start them itself. With
    `tokenizer_may_be_absent` a missing tokenizer is listed in `Plan.unchecked`, where `model.vocab_size` is
    given beside it.
    """
    config = load_run_config(path, overrides, _section_of_weights)
    named, tokenizer, unchecked = config.data.tokenizer, None, ()
    if named is not None and tokenizer_may_be_absent and not named.exists():
        if config.model.vocab_size is None:
            raise UserError(
                f"data.tokenizer={named}: is not there, and without model.vocab_size the model's size is not known; "
                + (hub_hint(named) or "make the tokenizer with `megalite tokenizer train`")
                + ", or give model.vocab_size=N"
            )
        hint = f"; {found}" if (found := hub_hint(named)) else ""
        unchecked = (f"not checked: data.tokenizer={named}: it is not there{hint}",)
    elif named is not None:
        tokenizer = _open_tokenizer(named)
    config = config.resolve(world_size=world_size, vocab_size=tokenizer.vocab_size if tokenizer else None)
    return replace(plan_of(config, tokenizer.digest if tokenizer else None), unchecked=unchecked)


def _open_tokenizer(named: Path) -> Tokenizer:
    try:
        return load_tokenizer(named)
    except UserError as error:
        raise UserError(f"data.tokenizer={error}") from error


def _section_of_weights(path: Path) -> dict[str, Any]:
    from megalite.convert.open import section_of_weights  # with the readers of foreign formats

    return section_of_weights(path)


def plan_of(config: RunConfig, tokenizer_digest: str | None) -> Plan:
    """Return the plan of a configuration that `RunConfig.resolve` has resolved and checked.

    Raises UserError for parameter groups that do not fit the model.
    """
    stages = config.placement
    plan = Plan(
        config=config,
        layout=config.layout,
        placement=stages,
        stage_layers=partition(config.model.num_hidden_layers, stages.num_stages, config.parallel.stage_layers),
        tokenizer_digest=tokenizer_digest,
    )
    _check_parameter_groups(plan)
    return plan
