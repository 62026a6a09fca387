"""``python tools/deepspeed_json_page.py > docs/reference/deepspeed_json.md``: the page of the DeepSpeed JSON's keys."""

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from megalite.config.deepspeed.rules import ByType, Derived, Honoured, Off, Refused, Unused
from megalite.config.deepspeed.table import TABLE
from megalite.settings.validation import show

_HEAD = """\
# The DeepSpeed JSON

A run file names a DeepSpeed JSON under `deepspeed`, by its path or with its content. This page lists every section and
key that DeepSpeed 0.19.8 documents or reads. Nothing is ignored silently: a key that is not listed is an error that
names the nearest key, and a value that is not supported is an error that names what to write instead.

`python tools/deepspeed_json_page.py` makes this page from the table that reads the JSON.

- **honoured**: passed to DeepSpeed's engine as written. `"auto"` is DeepSpeed's default unless the row says otherwise.
- **follows**: the run file states the value; the JSON has `"auto"` or the same value.
- **not used**: accepted and left out, for the reason in the row. The start says so, except for the values in brackets.
- **refused**: not supported. The values in brackets turn the feature off, and are allowed.

The values of `"auto"`:

- `bf16.enabled`, `fp16.enabled`: `train.precision`. Without `train.precision` the value is bf16, or fp16 where the JSON
  excludes bf16, and the start says so. An `enabled` that is true or false must agree with `train.precision`.
- `optimizer.params`: `train.optimizer` of the run file. Parameters that both state must agree. A parameter that neither
  states has megalite's default where the JSON says `"auto"`, and DeepSpeed's default where the JSON omits it.
- `scheduler.params`: `train.schedule.warmup_steps` (where `train.schedule` has no other key; 1 where it is 0, because
  DeepSpeed requires at least 1), `train.steps` and the optimizer's rate. `warmup_min_lr` is 0. A scheduler that is all
  `"auto"` gives way to a `train.schedule` that has more than the warm-up, and the start says so.
- bucket sizes of `zero_optimization`: the model's `hidden_size`, by the rules of transformers.

In bf16 and fp16, ZeRO stage 0 runs as stage 1, and the start says so: without ZeRO, DeepSpeed has no AdamW over fp32
master weights that works under a pipeline. The training is the same; the optimizer's state is divided among the
replicas. Without any JSON a run is at stage 1, in `train.precision`.

With `parallel.engine: torch` these keys mean what they say: `zero_optimization.stage`, `gradient_clipping`, `bf16`,
`fp16` with its loss scale, `data_types.grad_accum_dtype` (gradients are reduced in it too), `optimizer`, and those of
recomputed activations. `scheduler`, `offload_optimizer`, `offload_param` and `communication_data_type` are refused by
name. The sizes of buckets and the other keys of `zero_optimization` tune DeepSpeed's own buffers: the torch engine
reduces and gathers layer by layer.

| key | treatment |
| --- | --- |
"""
_AUTO = {"default": "", "resolved": "; `auto` is computed from the run", "refused": "; `auto` is refused"}


def deepspeed_table() -> str:
    """Return the page, in Markdown."""
    return _HEAD + "".join(f"| `{key}` | {words} |\n" for key, words in _rows(TABLE, ""))


def _rows(rules: Mapping[str, Any], at: str) -> Iterator[tuple[str, str]]:
    for name, rule in rules.items():
        yield from _rows_of(rule, at + name)


def _rows_of(rule: Any, key: str) -> Iterator[tuple[str, str]]:
    match rule:
        case Honoured():
            yield key, f"honoured: {rule.kind.words}{_AUTO[rule.auto]}"
        case Derived():
            yield key, f"follows `{rule.follows}`"
        case Unused():
            yield key, f"not used: {rule.reason}{_stand(rule.quiet)}"
        case Refused():
            yield key, _refusal(rule.reason, rule.instead, rule.harmless)
        case Off():
            yield f"{key}.{rule.switch}", _refusal(rule.reason, rule.instead, rule.off)
        case ByType():
            yield f"{key}.type", f"honoured: {', '.join(rule.params)}"
            for name, refused in rule.refused.items():
                yield f"{key}.type: {name}", _refusal(refused.reason, refused.instead, ())
            yield from _rows(rule.others, f"{key}.")
            yield from _parameters(rule, key)
        case _:
            yield from _rows(rule, f"{key}.")


def _parameters(rule: ByType, key: str) -> Iterator[tuple[str, str]]:
    """Each parameter once, with the types that have it."""
    types: dict[tuple[str, str], list[str]] = {}
    for name, rules in rule.params.items():
        for row in _rows(rules, f"{key}.params."):
            types.setdefault(row, []).append(name)
    for (parameter, words), names in types.items():
        yield parameter, words if len(names) == len(rule.params) else f"{words} ({', '.join(names)})"


def _refusal(reason: str, instead: str, harmless: tuple[object, ...]) -> str:
    return f"refused: {reason}; {instead}{_stand(harmless)}"


def _stand(values: tuple[object, ...]) -> str:
    return f" [{', '.join(f'`{show(value)}`' for value in values)}]" if values else ""


if __name__ == "__main__":
    sys.stdout.write(deepspeed_table())
