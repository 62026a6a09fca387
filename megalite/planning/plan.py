"""The plan of a run, before any rank starts: a resolved configuration, its layout and stages, and what follows.

Every launcher calls `prepare` first, and ``megalite train --dry-run`` does little else. It forms no process group and
needs no accelerator, so that configuration errors are reported within a second. `megalite.planning.preflight` checks a
plan against the machine, the data and the checkpoints.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

from megalite.checkpoint.compatibility import CheckpointRequirements
from megalite.checkpoint.discovery import CHECKPOINTS
from megalite.checkpoint.manifest import Manifest, OptimizerRecord
from megalite.checkpoint.special_tokens import DocumentTokens
from megalite.config import RunConfig, load_run_config
from megalite.config.hub_names import hub_hint
from megalite.data.indexed.dataset import IndexedDataset
from megalite.data.indexed.format import DatasetSidecar
from megalite.data.order.digest import order_digest
from megalite.data.tokenizers.base import Tokenizer
from megalite.data.tokenizers.load import load_tokenizer
from megalite.errors import UserError
from megalite.model.structure import meta_stage, weight_shapes
from megalite.model.weights import Weights
from megalite.optim.parameter_groups import ParameterSettings, parameter_settings, rule_faults, unequal_parts
from megalite.parallel.layout import ParallelLayout
from megalite.parallel.placement import Placement
from megalite.pipeline.partition import partition
from megalite.planning.model_files import model_files, tokens_of_documents
from megalite.settings.validation import Fault, report


@dataclass(frozen=True)
class Plan:
    """A run that can start: a resolved configuration whose parts fit each other."""

    config: RunConfig
    layout: ParallelLayout
    placement: Placement
    stage_layers: tuple[range, ...]
    """The layers of every stage."""
    tokenizer_digest: str | None = None
    unchecked: tuple[str, ...] = ()
    """Files that a dry run could not check, since they do not exist yet; a line each."""

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
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
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
            layout=f"{self.layout}, {self.config.sharding}, {self.config.precision}",
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

    def model_files(self) -> dict[str, bytes]:
        """Return the small files of every checkpoint, as `megalite.planning.model_files.model_files` does."""
        return model_files(self.config, self.first_weights, self._sidecars)

    @cached_property
    def documents(self) -> DocumentTokens:
        """The end and beginning tokens of documents."""
        return tokens_of_documents(self.first_weights, self._sidecars, self.tokenizer_digest)

    @cached_property
    def first_weights(self) -> Weights | None:
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
        """The sidecar files of the token indices to train on, of those that have one."""
        prefixes = [source.prefix for source in self.config.data.train if source.prefix is not None]
        found = [IndexedDataset(prefix).sidecar for prefix in prefixes]
        return [sidecar for sidecar in found if sidecar is not None]


def prepare(
    path: Path, overrides: Sequence[str], world_size: int | None, *, tokenizer_may_be_absent: bool = False
) -> Plan:
    """Read a run file and resolve it; raise UserError for what cannot work. `preflight` looks at the rest.

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
    whole = meta_stage(model, range(model.num_hidden_layers), tensor=(0, plan.layout.size("tensor")))
    parts = [tuple(shard.spec.name for shard in placed.shards) for placed in whole.placed_parameters]
    if unequal := unequal_parts(parts, plan.parameter_settings):
        text = f": {unequal[0]} and {unequal[1]} are parts of one matrix in training, and have different settings; "
        report([origin.line(Fault(key, f"{text}match both of them, or none"))])
