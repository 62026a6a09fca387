"""How the sections of a run fit each other and the ranks: what is wrong between them, with the nearest fix."""

from collections.abc import Iterator
from math import gcd
from typing import Protocol

from megalite.config.activation_checkpointing import CHECKPOINT_INTERVAL, NUMBER_CHECKPOINTS
from megalite.config.data import DataSection
from megalite.config.deepspeed.rules import Precision
from megalite.config.deepspeed.settings import DeepSpeedSettings
from megalite.config.sections import CheckpointSection, ParallelSection, TrainSection
from megalite.model.config import ModelConfig
from megalite.parallel.layout import ParallelLayout
from megalite.pipeline.schedules import refusal
from megalite.settings.section import divisors
from megalite.settings.validation import Fault, Origin, alternatives, show


class Run(Protocol):
    """What is looked at of a whole run."""

    @property
    def model(self) -> ModelConfig: ...
    @property
    def data(self) -> DataSection: ...
    @property
    def parallel(self) -> ParallelSection: ...
    @property
    def train(self) -> TrainSection: ...
    @property
    def checkpoint(self) -> CheckpointSection: ...
    @property
    def deepspeed(self) -> DeepSpeedSettings: ...
    @property
    def origin(self) -> Origin: ...
    @property
    def layout(self) -> ParallelLayout: ...
    @property
    def precision(self) -> Precision: ...
    @property
    def zero_stage(self) -> int: ...


def recompute_faults(train: TrainSection, deepspeed: DeepSpeedSettings) -> Iterator[Fault]:
    asked = deepspeed.recompute

    def line(key: str) -> str:
        return deepspeed.origin.line(Fault(tuple(key.split(".")), f"={show(asked[key])}"))

    if asked and train.recompute not in (None, "full"):
        first = next(iter(asked))
        text = f"={show(train.recompute)} stands beside {line(first)}, which recomputes whole layers"
        yield Fault(("train", "recompute"), f"{text}; write full, or leave {first} out")
    if train.recompute_every > 1:
        every = ("train", "recompute_every")
        if not asked and train.recompute != "full":
            text = f"={train.recompute_every} belongs to train.recompute=full, not to"
            yield Fault(every, f"{text} {train.recompute or 'none'}; write full, or leave it out")
        for key in (NUMBER_CHECKPOINTS, CHECKPOINT_INTERVAL):
            if key in asked:
                text = f"={train.recompute_every} stands beside {line(key)}, which recomputes every layer"
                yield Fault(every, f"{text}; keep one of them")


def optimizer_faults(train: TrainSection, deepspeed: DeepSpeedSettings) -> Iterator[Fault]:
    """Find what the run file and the JSON state of the optimizer and the learning rate's schedule, and differently."""
    if train.optimizer is not None:
        stated = train.optimizer.stated
        for name, key, value in deepspeed.optimizer_disagreements(stated):
            other = deepspeed.origin.line(Fault(key, f"={show(value)}"))
            fix = "write the same optimizer" if name == "name" else "write 'auto' there"
            text = f"={show(stated[name])} disagrees with {other}; {fix}, or state it once"
            yield Fault(("train", "optimizer", name), text)
        if deepspeed.scheduler is not None and not scheduler_gives_way(train, deepspeed):
            for number, group in enumerate(train.optimizer.groups):
                if group.lr_scale not in (None, 1.0):
                    other = deepspeed.origin.line(Fault(("scheduler",), ""))
                    text = f"={show(group.lr_scale)} stands beside {other}, which sets one rate for all groups; write "
                    text += "train.schedule in place of the scheduler"
                    yield Fault(("train", "optimizer", "groups", number, "lr_scale"), text)
    if train.schedule is not None and deepspeed.scheduler is not None and not scheduler_gives_way(train, deepspeed):
        other = deepspeed.origin.line(Fault(("scheduler",), ""))
        if not deepspeed.warms_up or train.schedule.model_fields_set - {"warmup_steps"}:
            here, there = "train.schedule here", "scheduler there"
            if deepspeed.warms_up:
                here += " (or all of it but warmup_steps)"
                there += " (or write 'auto' for all its params)"
            text = f" stands beside {other}, which states another; delete {here}, or {there}"
            yield Fault(("train", "schedule"), text)
            return
        steps, theirs = train.schedule.warmup_steps, deepspeed.scheduler["params"].get("warmup_num_steps", "auto")
        if theirs not in ("auto", max(1, steps)) and "warmup_steps" in train.schedule.model_fields_set:
            key = deepspeed.origin.line(Fault(("scheduler", "params", "warmup_num_steps"), f"={show(theirs)}"))
            text = f"={steps} disagrees with {key}; write 'auto' there, or state it once"
            yield Fault(("train", "schedule", "warmup_steps"), text)


def scheduler_gives_way(train: TrainSection, deepspeed: DeepSpeedSettings) -> bool:
    """Whether the JSON's scheduler is left out for `train.schedule`: it is all "auto", the trainer's own setting.

    A `train.schedule` that states the warm-up alone fills the "auto" in, and the scheduler stays.
    """
    schedule = train.schedule
    states_a_curve = schedule is not None and bool(schedule.model_fields_set - {"warmup_steps"})
    return states_a_curve and deepspeed.scheduler_is_auto


def rollback_faults(config: Run) -> Iterator[Fault]:
    spike = config.train.spike
    if spike is None or spike.action != "rollback":
        return
    action = ("train", "spike", "action")
    if not config.checkpoint.every:
        text = "='rollback' has no checkpoint to go back to before the last step; set checkpoint.every, or write skip"
        yield Fault(action, text)
    if config.data.order != "streaming":
        text = f"='rollback' passes samples over, and data.order={show(config.data.order)} has no more than it needs"
        yield Fault(action, f"{text}; write data.order=streaming, or skip")


def fit_faults(config: Run, world_size: int | None, vocab_size: int | None) -> Iterator[Fault]:
    yield from _vocabulary_faults(config.model, vocab_size)
    yield from _tensor_faults(config.model, config.parallel.tensor)
    yield from _token_share_faults(config.parallel, config.train.micro_batch_size, config.data.sequence_length)
    yield from _pipeline_faults(config.model, config.parallel)
    found = list(_world_faults(config.layout, world_size)) or list(_batch_faults(config.train, config.layout))
    yield from found or _schedule_faults(config)
    if config.data.sequence_length > config.model.max_position_embeddings:
        positions = config.model.max_position_embeddings
        text = f"={config.data.sequence_length} is longer than model.max_position_embeddings={positions}"
        yield Fault(("data", "sequence_length"), f"{text}; use at most {positions}")


def _vocabulary_faults(model: ModelConfig, vocab_size: int | None) -> Iterator[Fault]:
    if model.vocab_size is None:
        yield Fault(("model", "vocab_size"), " is missing, and there is no tokenizer to take it from; write either")
    elif vocab_size is not None and model.vocab_size < vocab_size:
        text = f"={model.vocab_size} is smaller than the tokenizer's {vocab_size}; use at least that, or leave it out"
        yield Fault(("model", "vocab_size"), text)


def _tensor_faults(model: ModelConfig, tensor: int) -> Iterator[Fault]:
    if fault := tensor_size_fault(model, tensor):
        yield Fault(("parallel", "tensor"), fault)


def tensor_size_fault(model: ModelConfig, tensor: int) -> str | None:
    """Return the first rule that a tensor axis of this size breaks, with sizes that break none; None where it fits."""
    allowed = [size for size in divisors(model.num_attention_heads) if _tensor_rule(model, size) is None]
    broken = _tensor_rule(model, tensor)
    return f"={tensor} {broken}; use {alternatives(allowed)}" if broken else None


def _tensor_rule(model: ModelConfig, tensor: int) -> str | None:
    groups = model.num_key_value_heads
    if model.num_attention_heads % tensor:
        return f"does not divide model.num_attention_heads={model.num_attention_heads}"
    if groups % tensor and tensor % groups:
        return f"neither divides model.num_key_value_heads={groups} nor is divided by it"
    if model.intermediate_size % tensor:
        return f"does not divide model.intermediate_size={model.intermediate_size}"
    if model.vocab_size is not None and model.vocab_size < tensor:
        return f"is more than model.vocab_size={model.vocab_size}"
    return None


def _token_share_faults(parallel: ParallelSection, rows: int, length: int) -> Iterator[Fault]:
    """Find a microbatch whose tokens sequence parallelism cannot share out evenly."""
    size, tokens = parallel.tensor, rows * length
    if not parallel.sequence_parallel or tokens % size == 0:
        return
    text = f"=true divides the {tokens} tokens of a microbatch over parallel.tensor={size} ranks, which is not even"
    lengths = alternatives(_multiples_near(length, size // gcd(size, rows)))
    batches = alternatives(_multiples_near(rows, size // gcd(size, length)))
    fix = f"use a data.sequence_length of {lengths}, or a train.micro_batch_size of {batches}"
    yield Fault(("parallel", "sequence_parallel"), f"{text}; {fix}")


def _pipeline_faults(model: ModelConfig, parallel: ParallelSection) -> Iterator[Fault]:
    layers, stages = model.num_hidden_layers, parallel.pipeline * parallel.virtual_stages
    product = "parallel.pipeline" if parallel.virtual_stages == 1 else "parallel.pipeline x parallel.virtual_stages"
    if parallel.pipeline > layers:
        text = f"={parallel.pipeline} is more than model.num_hidden_layers={layers}; use at most {layers}"
        yield Fault(("parallel", "pipeline"), text)
    elif stages > layers:
        most = layers // parallel.pipeline
        fewer = layers // parallel.virtual_stages
        others = [f"parallel.pipeline={fewer}"] * (fewer > 0) + [
            "parallel.virtual_stages=1 with schedule 1f1b or zb_h1"
        ]
        fix = f"use at most {most}" if most > 1 else f"use {', or '.join(others)}"
        text = f"={parallel.virtual_stages} x parallel.pipeline={parallel.pipeline} is {stages} stages, more than"
        yield Fault(("parallel", "virtual_stages"), f"{text} model.num_hidden_layers={layers}; {fix}")
    elif parallel.stage_layers is not None:
        given = parallel.stage_layers
        if len(given) != stages or sum(given) != layers:
            text = f"={show(given)} is {len(given)} stages of {sum(given)} layers"
            allowed = f"write {product}={stages} numbers that sum to model.num_hidden_layers={layers}"
            yield Fault(("parallel", "stage_layers"), f"{text}; {allowed}")


def _schedule_faults(config: Run) -> Iterator[Fault]:
    """Find batches, those of a ramp-up too, whose microbatches the schedule cannot run."""
    parallel, train = config.parallel, config.train
    ramp = train.batch_size_rampup
    sizes = range(train.global_batch_size, train.global_batch_size + 1)
    if ramp is not None:
        sizes = range(ramp.start, train.global_batch_size + 1, ramp.increment)
    for size in sizes:
        microbatches = size // (train.micro_batch_size * config.layout.group_size("batch"))
        if found := refusal(parallel.schedule, parallel.pipeline, parallel.virtual_stages, microbatches):
            key, _, rest = found.partition("=")
            where = "train.global_batch_size" if size == train.global_batch_size else "train.batch_size_rampup"
            batch = f" a step ({where} has steps of {size} sequences)" if "microbatches" in rest else ""
            yield Fault(tuple(key.split(".")), f"={rest}{batch}")
            return


def _world_faults(layout: ParallelLayout, world_size: int | None) -> Iterator[Fault]:
    if world_size is None or world_size == layout.world_size:
        return
    replica = layout.world_size // layout.size("data")
    fix = f"start {alternatives(_multiples_near(world_size, replica))}"
    if world_size % replica == 0:
        fix = f"start {layout.world_size}, or write parallel.data=auto"
    tensor, pipeline, data = map(layout.size, ("tensor", "pipeline", "data"))
    text = f"={tensor} x parallel.pipeline={pipeline} x data parallel {data}"
    yield Fault(("parallel", "tensor"), f"{text} is {layout.world_size} ranks, but {world_size} were started; {fix}")


def _multiples_near(size: int, factor: int) -> list[int]:
    below = size // factor * factor
    return [multiple for multiple in (below, below + factor) if multiple]


def _batch_faults(train: TrainSection, layout: ParallelLayout) -> Iterator[Fault]:
    data_size = layout.group_size("batch")
    step, batch = train.micro_batch_size * data_size, train.global_batch_size
    if batch % step:
        text = f"={train.micro_batch_size} x data parallel {data_size} does not divide train.global_batch_size={batch}"
        yield Fault(
            ("train", "micro_batch_size"), f"{text}; use a global batch of {alternatives(_multiples_near(batch, step))}"
        )
    ramp = train.batch_size_rampup
    for name, size in (("start", ramp.start), ("increment", ramp.increment)) if ramp is not None else ():
        if size % step:
            text = f"={size} is no multiple of train.micro_batch_size={train.micro_batch_size} x data parallel"
            fix = alternatives(_multiples_near(size, step))
            yield Fault(("train", "batch_size_rampup", name), f"{text} {data_size}; use {fix}")


def deepspeed_faults(config: Run) -> Iterator[Fault]:
    checkpoint = config.checkpoint
    every = [f"checkpoint.every={checkpoint.every}"] if checkpoint.every else []
    asked = every + (["checkpoint.last=true"] if checkpoint.last else [])
    fix = ["checkpoint.every=0"] * len(every) + ["checkpoint.last=false"] * checkpoint.last
    for section in config.deepspeed.on_nvme if asked else ():
        text = f"='nvme' does not go with {asked[0]}: a checkpoint reads the state in memory; write 'cpu', or "
        yield Fault(("zero_optimization", section, "device"), text + " and ".join(fix))
    train = config.train
    microbatches, rest = divmod(train.global_batch_size, train.micro_batch_size * config.layout.group_size("batch"))
    values = {
        "train.global_batch_size": train.global_batch_size,
        "train.micro_batch_size": train.micro_batch_size,
        "train.global_batch_size/(train.micro_batch_size x data parallel)": None if rest else microbatches,
        "model.vocab_size": config.model.vocab_size,
        "parallel.pipeline": config.parallel.pipeline,
    }
    yield from config.deepspeed.disagreements(values, config.origin.file)
