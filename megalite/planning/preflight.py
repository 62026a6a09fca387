"""Preflight: the checks of a plan against this machine, its checkpoints and its data, before any rank starts."""

from ctypes.util import find_library
from dataclasses import replace
from pathlib import Path

from megalite.checkpoint.discovery import resume_candidates
from megalite.checkpoint.reader import CheckpointReader
from megalite.config import RunConfig
from megalite.data.datasets import Datasets, open_datasets
from megalite.data.indexed.dataset import IndexedDataset
from megalite.data.indexed.format import with_suffix
from megalite.errors import UserError
from megalite.monitoring.run_folder import require_run_folder
from megalite.planning.model_files import require_readable_model_files
from megalite.planning.plan import Plan


def check_machine(config: RunConfig) -> None:
    """Raise UserError where this host lacks a requirement of the run: a writable run.dir, or a library.

    A quick check for every host; `check_start` and `check_data` begin with it.
    """
    require_run_folder(config.run.dir)
    if (sections := config.deepspeed.on_nvme) and find_library("aio") is None:
        raise UserError(
            f"deepspeed.zero_optimization.{sections[0]}.device='nvme' needs libaio, which this machine does not "
            "have; install it (apt install libaio-dev, or dnf install libaio-devel), or write 'cpu'"
        )


def check_start(plan: Plan) -> str:
    """Return a line on where the run will begin; raise UserError where that is not of this run's model.

    Whether the files are whole the ranks look at together. Also raised where the machine lacks what it takes, and
    where a file that goes into every checkpoint is of no use to `generate` and `convert`.
    """
    check_machine(plan.config)
    start = _where_it_begins(plan)
    require_readable_model_files(plan.config, plan.first_weights)
    return start


def _where_it_begins(plan: Plan) -> str:
    config, weights = plan.config, plan.first_weights
    for folder in resume_candidates(config):
        try:
            reader = CheckpointReader(folder)
        except UserError:
            if config.resume != "auto":
                raise
            continue
        plan.requirements.require_resumable(reader)
        passed_over = f"; {init_from_ignored(config)}" if weights is not None else ""
        return f"start: from {folder}, step {reader.manifest.step:,}, if it is whole{passed_over}"
    if weights is None:
        return "start: anew"
    plan.requirements.require_weights(weights)
    return f"start: with the weights of {config.init_from}"


def init_from_ignored(config: RunConfig) -> str:
    """Return the line about `init_from` where the run resumes from a checkpoint instead."""
    return (
        f"init_from={config.init_from} is ignored, since the run resumes from a checkpoint; to start from "
        "those weights, set another run.dir, or resume=never"
    )


def check_data(plan: Plan, *, keep_index: bool = True) -> Datasets:
    """Open the data as the ranks will.

    Raises UserError where data is missing, damaged, not enough or of another vocabulary, or where `run.dir` is not
    writable.
    """
    check_machine(plan.config)
    _check_sources(plan)
    return open_datasets(plan.config, keep_index=keep_index)


def _check_sources(plan: Plan) -> None:
    for prefix in _prefixes(plan.config):
        _check_source(plan, prefix)


def _check_source(plan: Plan, prefix: Path) -> None:
    """Raise UserError where a token index is missing, damaged, or of another vocabulary."""
    vocab_size, path, digest = plan.config.model.vocab_size, plan.config.data.tokenizer, plan.tokenizer_digest
    assert vocab_size is not None
    indexed = IndexedDataset(prefix)
    indexed.require_vocabulary(vocab_size)
    indexed.require_sound_mask()
    if digest and indexed.sidecar and indexed.sidecar.tokenizer_sha256 != digest:
        raise UserError(
            f"{prefix}.json: made with a tokenizer of SHA-256 {indexed.sidecar.tokenizer_sha256[:12]}, "
            f"not with data.tokenizer={path} ({digest[:12]}); preprocess again, or name the other tokenizer"
        )


def data_is_present(config: RunConfig) -> bool:
    """Return whether every training source has at least one of its files."""
    return not any(source.prefix is not None and _is_absent(source.prefix) for source in config.data.train)


def check_present_data(plan: Plan) -> tuple[Datasets | None, list[str]]:
    """Check the data that exists, as `check_data` does, without writing an index, for a dry run.

    Returns the datasets, None where a training source is absent, and a line for each absent source. A source with
    only some of its files is damaged, not absent. Raises UserError as `check_data` does.
    """
    data = plan.config.data
    absent = {prefix for prefix in _prefixes(plan.config) if _is_absent(prefix)}
    present = data.model_copy(
        update={
            "train": tuple(source for source in data.train if source.prefix not in absent),
            "valid": tuple(source for source in data.valid if source.prefix not in absent),
            # Without a tokenizer the special tokens of fill-in-the-middle are unknown.
            **({"fim_rate": 0.0} if plan.unchecked else {}),
        }
    )
    lines = [f"not checked: {prefix}: neither {prefix}.idx nor {prefix}.bin is there" for prefix in sorted(absent)]
    plan = replace(plan, config=plan.config.model_copy(update={"data": present}))
    if len(present.train) == len(data.train):
        return check_data(plan, keep_index=False), lines
    check_machine(plan.config)
    _check_sources(plan)
    return None, lines


def _prefixes(config: RunConfig) -> list[Path]:
    """Return the prefixes of the token indices to train and to evaluate on."""
    sources = (*config.data.train, *config.data.valid)
    return [source.prefix for source in sources if source.prefix is not None]


def _is_absent(prefix: Path) -> bool:
    return not any(with_suffix(prefix, suffix).exists() for suffix in (".idx", ".bin"))
