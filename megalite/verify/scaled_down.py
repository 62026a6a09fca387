"""Scale a run down for verification: smaller widths, fewer layers and tokens, the same divisibility and stages."""

from dataclasses import replace
from math import ceil

from megalite.config import ModelConfig, RunConfig, TrainSection, read_model
from megalite.config.deepspeed.settings import DeepSpeedSettings
from megalite.model.structure import weight_shapes
from megalite.optim.parameter_groups import rule_faults
from megalite.parallel.layout import ParallelLayout

_HEAD_DIM, _HIDDEN, _SEQUENCE, _MICRO_BATCH, _STAGE_LAYERS = 8, 256, 64, 2, 3


def scale_down(config: RunConfig) -> tuple[RunConfig, tuple[str, ...]]:
    """Return a smaller resolved run, and a line for each changed setting: ``model.hidden_size=128, not 4096``.

    Unchanged are the architecture, vocabulary, tying, the ratio of query heads to key-value heads, their division over
    the tensor axis, the layout, the schedule, uneven stages and the ZeRO stage. Widths, layers, sequence and batch
    shrink; ZeRO's size thresholds shrink with the widths. The weights are drawn at random: `init_from` is left out.

    Raises UserError if the smaller run does not fit the layout; the whole run does not fit it either.
    """
    layout = config.layout
    stage_layers = _stage_layers(config)
    model = _model(config.model, layout.size("tensor"), sum(stage_layers) if stage_layers else _layers(config))
    scaled = config.model_copy(
        update={
            "model": model,
            "init_from": None,
            "parallel": config.parallel.model_copy(update={"stage_layers": stage_layers}),
            "data": config.data.model_copy(update={"sequence_length": _sequence_length(config)}),
            "train": _train(config, layout, model),
            "deepspeed": _zero_sizes(config.deepspeed.without_derived(), model.hidden_size, config.model.hidden_size),
        }
    )
    resolved = scaled.resolve(world_size=layout.world_size, vocab_size=None)
    return resolved, tuple(_shrunk(config, resolved))


def _model(model: ModelConfig, tensor: int, layers: int) -> ModelConfig:
    groups = model.num_key_value_heads
    # Fewer key-value heads than ranks are replicated; more are divided, and two per rank are enough.
    kv_heads = groups if groups < tensor else min(groups, 2 * tensor)
    heads = kv_heads * model.num_attention_heads // groups
    head_dim = _head_dim(model)
    hidden = max(1, model.hidden_size * head_dim // (model.num_attention_heads * model.head_dim)) * heads
    hidden = min(hidden, _HIDDEN)
    width = 8 * tensor
    inner = ceil(hidden * model.intermediate_size / model.hidden_size / width) * width
    return read_model(
        model.model_dump()
        | {
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "intermediate_size": min(inner, model.intermediate_size),
        }
    )


def _head_dim(model: ModelConfig) -> int:
    """Return the smallest head dimension that the architecture accepts: rotary embeddings need an even one."""
    for head_dim in range(min(_HEAD_DIM, model.head_dim), model.head_dim):
        try:
            read_model(model.model_dump() | {"head_dim": head_dim})
        except ValueError:
            continue
        return head_dim
    return model.head_dim


def _stage_layers(config: RunConfig) -> tuple[int, ...] | None:
    """Return smaller uneven stages, of which the smallest has one layer; None for even stages."""
    if (given := config.parallel.stage_layers) is None:
        return None
    return tuple(min(count - min(given) + 1, _STAGE_LAYERS) for count in given)


def _layers(config: RunConfig) -> int:
    """Return two layers per stage, or one per stage plus the remainder if the stages are uneven."""
    layers, stages = config.model.num_hidden_layers, config.placement.num_stages
    return min(layers, stages + (layers % stages or stages))


def _sequence_length(config: RunConfig) -> int:
    """Return a sequence length that the tensor axis divides, if sequence parallelism is on."""
    length, tensor = min(config.data.sequence_length, _SEQUENCE), config.parallel.tensor
    return max(tensor, length - length % tensor) if config.parallel.sequence_parallel else length


def _train(config: RunConfig, layout: ParallelLayout, model: ModelConfig) -> TrainSection:
    micro = min(config.train.micro_batch_size, _MICRO_BATCH)
    # Schedules need multiples of the pipeline's stages; with two per stage their steady phase runs too.
    microbatches = min(config.gradient_accumulation_steps, 2 * layout.size("pipeline"))
    groups = config.optimizer.groups
    without_effect = {number for number, _ in rule_faults(weight_shapes(model), groups)}
    groups = tuple(group for number, group in enumerate(groups) if number not in without_effect)
    return config.train.model_copy(
        update={
            "micro_batch_size": micro,
            "global_batch_size": micro * microbatches * layout.group_size("batch"),
            "batch_size_rampup": None,
            "optimizer": config.train.optimizer and config.train.optimizer.model_copy(update={"groups": groups}),
        }
    )


def _zero_sizes(settings: DeepSpeedSettings, hidden: int, from_hidden: int) -> DeepSpeedSettings:
    """Shrink ZeRO's size thresholds: those for norms with the width, those for matrices with its square."""
    zero = dict(settings.document.get("zero_optimization", {}))
    ratio = hidden / from_hidden
    if zero.get("stage") == 3:
        zero.setdefault("stage3_param_persistence_threshold", 100_000)  # DeepSpeed's default
    powers = {"stage3_param_persistence_threshold": 1, "stage3_prefetch_bucket_size": 2, "reduce_bucket_size": 2}
    zero |= {name: max(1, int(zero[name] * ratio**power)) for name, power in powers.items() if name in zero}
    return replace(settings, document={**settings.document, **({"zero_optimization": zero} if zero else {})})


def _shrunk(before: RunConfig, after: RunConfig) -> list[str]:
    names = {
        "model": (
            *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
            "intermediate_size",
        ),
        "data": ("sequence_length",),
        "parallel": ("stage_layers",),
        "train": ("global_batch_size", "micro_batch_size"),
    }
    lines = []
    for section, keys in names.items():
        for key in keys:
            old, new = (getattr(getattr(config, section), key) for config in (before, after))
            if old != new:
                shown = [list(value) if isinstance(value, tuple) else value for value in (new, old)]
                lines.append(f"{section}.{key}={shown[0]}, not {shown[1]}")
    if before.train.batch_size_rampup is not None:
        lines.append("train.batch_size_rampup left out")
    for group in before.optimizer.groups:
        if group not in after.optimizer.groups:
            lines.append(f"train.optimizer.groups: the group of {group.match!r} left out, without effect on this model")
    if before.init_from is not None:
        lines.append(f"init_from={before.init_from} left out: the weights are drawn at random")
    return lines
