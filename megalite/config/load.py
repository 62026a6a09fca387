"""Reads a run file: YAML, dotted overrides and the DeepSpeed JSON, every fault in them told at once."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from megalite.config.blend_file import read_weights
from megalite.config.cross_checks import scheduler_gives_way
from megalite.config.deepspeed.parse import read_document, read_json
from megalite.config.deepspeed.rules import Precision
from megalite.config.deepspeed.settings import DeepSpeedSettings
from megalite.config.model_of_weights import SectionReader, fill_model
from megalite.config.not_a_run_file import require_no_folder, require_sections
from megalite.config.plugins import import_plugins
from megalite.config.run_config import RunConfig
from megalite.config.sections import OptimizerSection, run_sections_in
from megalite.config.shortened_run import shorten
from megalite.config.source_forms import is_text
from megalite.config.suggestions import unknown_key
from megalite.config.text_file import read_text
from megalite.config.yaml12 import Loader
from megalite.errors import UserError
from megalite.model.config import ModelConfig
from megalite.model.registry import FAMILIES
from megalite.settings.section import Section, fields_of
from megalite.settings.validation import Fault, FaultsError, Key, Origin, report, show
from megalite.settings.values import PATH_TEXT, Kind


def load_run_config(path: Path, overrides: Sequence[str] = (), read_section: SectionReader | None = None) -> RunConfig:
    """Read a run file, with the DeepSpeed JSON that it names and ``section.key=value`` overrides.

    An override's value is YAML, and its key may reach into the JSON: ``deepspeed.zero_optimization.stage=2``. The
    JSON's path is relative to the working directory. The modules of `plugins` are imported. With `read_section` the
    weights of `init_from` complete the section `model`.

    Raises:
        UserError: a file that is missing or cannot be parsed; keys, types or values that are not allowed; all of them
            at once, a line each.
    """
    document = _read_yaml(path)
    given = _parse_overrides(overrides)
    origin = Origin(path.name, overrides=tuple(key for key, _ in given))
    for key, value in given:
        if key == ("deepspeed",):
            document["deepspeed"] = value
    deepspeed_origin = _load_deepspeed(document, origin, path.parent)
    report([line for key, value in given if key != ("deepspeed",) and (line := _assign(document, key, value))])
    import_plugins(document.get("plugins"), origin)
    _load_sources(document, origin)
    if read_section is not None:
        report(list(map(origin.line, fill_model(document, read_section))))
    origin = replace(origin, notes=tuple(shorten(document, [key for key, _ in given])))
    return _validate(document, origin, deepspeed_origin)


def _parse_overrides(overrides: Iterable[str]) -> list[tuple[tuple[str, ...], Any]]:
    parsed: list[tuple[tuple[str, ...], Any]] = []
    lines: list[str] = []
    for text in overrides:
        key, _, value = text.partition("=")
        if not re.fullmatch(r"[a-z_]\w*(\.\w+)*=.*", text, re.DOTALL | re.IGNORECASE):
            lines.append(f"command line: {text!r} is not an override; write section.key=value")
            continue
        if not value.strip():
            # YAML reads nothing as null, not given; after a shell variable that is unset, nobody meant that.
            lines.append(f"command line: {key}= has no value; write one, or {key}=null for the default")
            continue
        try:
            parsed.append((tuple(key.split(".")), yaml.load(value, Loader)))  # noqa: S506 (a SafeLoader)
        except yaml.YAMLError as error:
            lines.append(f"command line: {key}={value!r} is not YAML: {_yaml_problem(error)}")
    report(lines)
    return parsed


def _assign(document: dict[str, Any], key: tuple[str, ...], value: Any) -> str | None:
    """Put a value where the dotted key says, making sections on the way; return a message where that cannot be."""
    node: Any = document
    for depth, part in enumerate(key):
        last = depth == len(key) - 1
        if isinstance(node, list) and part.isdigit() and int(part) < len(node):
            place: Any = int(part)
        elif isinstance(node, dict):
            place = part
        else:
            shown = f"{'.'.join(key[:depth])}={show(node)}"
            return f"command line: {'.'.join(key)} reaches into {shown}, which has no {part!r}"
        if last:
            node[place] = value
        elif isinstance(node, dict) and node.get(place) is None:
            node[place] = {}
        node = node[place]
    return None


def _load_deepspeed(document: dict[str, Any], origin: Origin, folder: Path) -> Origin:
    """Put the JSON's content in the place of its path; return where that content stands."""
    within = replace(origin, section=("deepspeed",))
    stated = document.get("deepspeed")
    if stated is None or isinstance(stated, Mapping):
        # Without a JSON the optimizer's state is divided among the replicas; a JSON that names no stage means 0.
        document["deepspeed"] = {"zero_optimization": {"stage": 1}} if stated is None else dict(stated)
        return within
    if not isinstance(stated, str):
        raise UserError(origin.line(Fault(("deepspeed",), f"={show(stated)} is neither a path nor a section")))
    path = _expanded(origin, ("deepspeed",), stated)
    if not path.is_file() and (folder / path).is_file():
        text = f"={show(stated)} is relative to the working directory; write {show(str(folder / path))}"
        raise UserError(origin.line(Fault(("deepspeed",), text)))
    document["deepspeed"] = read_json(path)
    # The path may stand on the command line; what the file says does not.
    inside = tuple(key for key in origin.overrides if key != ("deepspeed",))
    return replace(within, file=path.name, own_file=True, overrides=inside)


def _expanded(origin: Origin, key: tuple[str, ...], stated: str) -> Path:
    """Return the path that a file stands at; raise UserError where a variable in it is not known."""
    try:
        return Path(PATH_TEXT.read(stated))
    except ValueError as error:
        raise UserError(origin.line(Fault(key, str(error)))) from None


def _load_sources(document: dict[str, Any], origin: Origin) -> None:
    """Put the sources that a file lists in the place of its path; the path of a dataset is told of with its section."""
    data = document.get("data")
    if isinstance(data, dict) and isinstance(data.get("train"), str):
        path = _expanded(origin, ("data", "train"), data["train"])
        is_dataset = path.suffix in ("", ".bin", ".idx") or path.with_name(f"{path.name}.idx").exists()
        if not is_text(path) and (path.is_file() or not is_dataset):
            data["train"] = read_weights(path)


def _validate(document: dict[str, Any], origin: Origin, deepspeed_origin: Origin) -> RunConfig:
    settings, json_faults, notes = read_document(document["deepspeed"], _stated_precision(document), origin.file)
    lines = [deepspeed_origin.line(fault) for fault in json_faults]
    if "origin" in document:
        lines.append(origin.line(unknown_key(("origin",), document["origin"], RunConfig, RunConfig)))
    told = tuple(map(deepspeed_origin.line, notes))
    deepspeed = DeepSpeedSettings({} if json_faults else settings, deepspeed_origin, told)
    try:
        config = RunConfig.model_validate({**document, "deepspeed": deepspeed, "origin": origin})
    except ValidationError as error:
        errors = error.errors(include_url=False)
        found = [origin.line(fault) for details in errors for fault in _translate(details, document)]
        raise UserError("\n".join(dict.fromkeys([*found, *lines]))) from None
    report(lines)
    optimizer, schedule = config.train.optimizer, config.train.schedule
    if scheduler_gives_way(config.train, deepspeed):
        deepspeed = deepspeed.without_scheduler(origin.file)
    resolved = deepspeed.resolve_auto(
        hidden_size=config.model.hidden_size,
        steps=config.train.steps,
        lr=config.optimizer.lr,
        optimizer=optimizer.stated if optimizer is not None else None,
        warmup_steps=schedule.warmup_steps if schedule is not None else None,
    )
    # The JSON states in full what both may: nothing stands in the run twice.
    train = {
        "precision": resolved.precision,
        "optimizer": optimizer if resolved.optimizer is None else _groups_beside(optimizer, resolved),
        "schedule": schedule if resolved.scheduler is None else None,
    }
    return config.model_copy(update={"deepspeed": resolved, "train": config.train.model_copy(update=train)})


def _groups_beside(optimizer: OptimizerSection | None, settings: DeepSpeedSettings) -> OptimizerSection | None:
    """Return what the run keeps of ``train.optimizer`` where the JSON states the optimizer: the parameter groups."""
    if optimizer is None or not optimizer.groups:
        return None
    return OptimizerSection(**settings.optimizer or {}, groups=optimizer.groups)


def _stated_precision(document: Mapping[str, Any]) -> Precision | None:
    """Return `train.precision` where that is one; what is none is told of with the other faults of the section."""
    train = document.get("train")
    stated = train.get("precision") if isinstance(train, Mapping) else None
    return stated if stated in get_args(Precision) else None


def _read_yaml(path: Path) -> dict[str, Any]:
    require_no_folder(path)
    try:
        document = yaml.load(read_text(path), Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        raise UserError(f"{path.name}: {_yaml_problem(error)}") from None
    except RecursionError:
        raise UserError(f"{path.name}: the file nests too deeply to be read") from None
    return require_sections(path, document)


def _yaml_problem(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        # Braces of a variable end a plain text that stands within braces itself.
        within = mark.buffer is not None and mark.buffer[max(0, mark.pointer - 1) : mark.pointer + 1] == "${"
        hint = "; put a text with ${NAME} in quotes here" if within else ""
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem or error.context}{hint}"
    return str(error).splitlines()[0]


# --------------------------------------------------------------------------------- pydantic's errors in our words


def _translate(error: ErrorDetails, document: Mapping[str, Any]) -> Iterator[Fault]:
    """Turn one of pydantic's errors in a document into ours; its own text, which speaks of Python, is never shown."""
    key = error["loc"]
    section, name = _owner(key, document)
    cause = error.get("ctx", {}).get("error")
    match error["type"]:
        case "default_factory_not_called":
            return
        case "value_error" if isinstance(cause, FaultsError):
            yield from (Fault((*key, *fault.key), fault.text) for fault in cause.faults)
        case "value_error":
            yield Fault(key, str(cause))
        case "missing":
            state = "is empty" if _stands_in(document, key) else "is missing"
            yield Fault(key, f" {state}; write {_words(section, name)}")
        case "extra_forbidden":
            yield unknown_key(key, error["input"], section, RunConfig)
        case _:
            yield Fault(key, f"={show(error['input'])} is not {_words(section, name)}")


def _owner(key: Key, document: Mapping[str, Any]) -> tuple[type[Section], str]:
    """Return the section that an error's last part belongs to, and that part."""
    section: type[Section] = RunConfig
    for part in key[:-1]:
        if part == "model" and section is RunConfig:
            family = FAMILIES.get(str(document["model"].get("architecture")))
            section = ModelConfig if family is None else family.config
        elif isinstance(part, str):
            section = next(run_sections_in(fields_of(section)[part].annotation))
    return section, str(key[-1]) if key else ""


def _words(section: type[Section], name: str) -> str:
    """Say what a field may hold."""
    info = fields_of(section).get(name)
    kinds = [item for item in info.metadata if isinstance(item, Kind)] if info is not None else []
    if kinds:
        return kinds[0].words
    owned = next(run_sections_in(info.annotation), None) if info is not None else section
    listed = f"{{{', '.join(fields_of(owned))}}}" if owned is not None else "a section"
    several = info is not None and get_origin(info.annotation) is tuple
    return f"a list of {listed}" if several else f"a section {listed}"


def _stands_in(document: Any, key: Key) -> bool:
    """Whether a key stands in a document, where it may have no value."""
    for part in key[:-1]:
        document = document[part]
    return key[-1] in document
