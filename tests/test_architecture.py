"""Dependencies point one way: what each room of the house may import, read from the source.

An import inside a function counts as much as one at the top; only what importing a module costs is about the top.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "megalite"

PURE_PIPELINE = tuple(
    f"pipeline.{name}"
    for name in ("placement", "instructions", "timeline", "schedule", "partition", "simulate", "plot", "trace")
)

# A room is a module or a package, and the longest name that fits a module is its room. `errors` is open to all.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "errors": (),
    "layout": (),
    "paths": (),
    "faults": ("paths",),
    "deepspeed_json": ("faults", "paths"),
    "deepspeed_defaults": ("deepspeed_json",),
    "deepspeed_table": ("deepspeed_json", "faults"),
    "composition": ("config",),
    "config": (
        "config",
        "deepspeed_defaults",
        "deepspeed_json",
        "faults",
        "layout",
        "paths",
        "pipeline.placement",
        "pipeline.schedule",
    ),
    "launch": ("launch",),
    "cluster": ("cluster", "config"),
    "files": (),
    "heartbeat": ("files",),
    "interfaces": (),
    "run_state": ("files",),
    "finished": ("checkpoint", "plan", "run_state", "stopping"),
    "run_status": ("checkpoint.weights", "config", "files", "heartbeat", "run_state", "stopping"),
    "stopping": (),
    "stragglers": ("layout",),
    "data": ("config", "data", "faults", "files"),
    "checkpoint": ("checkpoint", "config", "faults", "files", "tensor_parallel.sharding"),
    "tensor_parallel.sharding": (),
    "tensor_parallel": ("tensor_parallel",),
    "allocator": (),
    "distributed": (
        *("allocator", "interfaces", "layout", "pipeline.instructions", "pipeline.placement"),
        "tensor_parallel.collectives",
    ),
    "model": ("config", "model", "tensor_parallel"),
    "model.loading": ("checkpoint.boxes", "checkpoint.weights", "model.stage", "tensor_parallel.sharding"),
    **dict.fromkeys(PURE_PIPELINE, PURE_PIPELINE),
    "pipeline.placement": (),
    "pipeline.instructions": ("pipeline.placement",),
    "pipeline": ("distributed", "model.dropout", "model.packing", "pipeline", "tensor_parallel.deferral"),
    "model.packing": (),
    "model.dropout": ("config",),
    "learning_rate": ("config",),
    "lean_torch": (),
    "metrics": ("checkpointer", "config", "files", "launch", "stragglers", "tensor_parallel.kernels"),
    "precision": (),
    "feed": ("config", "data.batches", "data.samples", "distributed", "model", "pipeline.executor"),
    "plots": (),
    "spikes": ("config",),
    "zero": (
        "config",
        "distributed",
        "lean_torch",
        "model",
        "precision",
        "tensor_parallel.deferral",
        "tensor_parallel.sharding",
    ),
    "bad_steps": ("distributed", "model.stage"),
    "checkpointer": ("checkpoint", "config", "distributed", "files", "zero_state"),
    "resume": (
        *("checkpoint", "config", "data.batches", "data.order_digest", "distributed", "faults", "plan"),
        "tensor_parallel.kernels",
    ),
    "zero_state": ("checkpoint.fragments", "checkpoint.manifest", "tensor_parallel.sharding", "zero"),
    "plan": (
        *("checkpoint", "config", "data", "layout", "memory", "model", "run_folder", "tensor_parallel.collectives"),
        *PURE_PIPELINE,
    ),
    "memory": ("config",),
    "run_folder": ("files",),
    "provenance": ("data", "plan"),
    "agreement": ("checkpoint.selection", "config", "data.fingerprint", "plan"),
    "rendezvous": ("agreement", "launch", "layout"),
    "doctor": ("distributed", "doctor", "launch", "layout"),
    "doctor.report": (),
    "doctor.speed": ("distributed", "doctor.report", "layout", "metrics", "tensor_parallel.kernels"),
    "doctor.disk": ("checkpoint.forecast", "distributed", "doctor.report", "plan"),
    "doctor.examination": ("agreement", "distributed", "doctor", "launch", "layout", "plan", "precision", "rendezvous"),
    "generation": (
        "checkpoint.companions",
        "checkpoint.manifest",
        "checkpoint.special_tokens",
        "checkpoint.weights",
        "config",
        "data.tokenizer",
        "distributed",
        "generation",
        "launch",
        "layout",
        "model",
        "precision",
        "tensor_parallel.collectives",
    ),
    "recorder": (
        "checkpoint.forecast",
        "checkpoint.retention",
        "checkpointer",
        "data.datasets",
        "distributed",
        "files",
        "metrics",
        "pipeline",
        "plan",
        "plots",
        "resume",
        "run_state",
        "spikes",
        "stopping",
        "stragglers",
        "tensor_parallel.kernels",
        "zero",
    ),
    "train": (
        "agreement",
        "bad_steps",
        "checkpoint",
        "checkpointer",
        "config",
        "data",
        "distributed",
        "feed",
        "files",
        "heartbeat",
        "launch",
        "learning_rate",
        "model",
        "pipeline",
        "plan",
        "precision",
        "recorder",
        "rendezvous",
        "resume",
        "run_state",
        "spikes",
        "stopping",
        "tensor_parallel.kernels",
        "zero",
        "zero_state",
    ),
    "verification": ("checkpoint.weights", "config", "model", "tensor_parallel.collectives"),
    "parity": ("parity",),
    "parity.cases": ("config", "deepspeed_json", "layout", "plan"),
    "parity.scale": ("config", "deepspeed_json", "layout"),
    "parity.reference": ("checkpoint.weights", "data", "model", "plan", "tensor_parallel"),
    "parity.comparison": (
        *("checkpoint.boxes", "checkpoint.fragments", "data.datasets", "distributed", "launch", "parity", "plan"),
        "train",
    ),
    "parity.table": ("layout", "parity.finding"),
    "cli": (
        *("checkpoint", "cli", "cluster", "config", "data", "doctor", "files", "finished", "generation", "launch"),
        *("layout", "parity", "paths", "plan", "plots", "provenance", "resume", "run_state", "run_status", "train"),
        "verification",
    ),
    "__main__": ("cli",),
}

HEAVY = ("torch", "deepspeed", "matplotlib")
LIGHT = (
    *("errors", "layout", "faults", "config", "deepspeed_json", "launch", "checkpoint", "cli", "cluster"),
    *("files", "heartbeat", "run_folder", "run_state", "run_status", "stopping", "stragglers"),
    *("doctor.report", "parity.cases", "parity.finding", "parity.scale", "parity.table"),
    "tensor_parallel.sharding",
    *PURE_PIPELINE,
)
TORCH_FILES = "checkpoint.megatron.torch_file"
PICKLES = ("pickle", "cloudpickle", "dill", "shelve", "marshal")


@dataclass(frozen=True)
class Import:
    """What an import statement names, and whether it runs as soon as its module is imported."""

    name: str
    at_top: bool


@cache
def sources() -> dict[str, ast.Module]:
    """Every module, by its name inside the package: ``pipeline.schedule``, and ``pipeline`` for the package's own."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    return found


@cache
def imports_of(module: str) -> tuple[Import, ...]:
    return tuple(walk_imports(sources()[module], at_top=True))


def walk_imports(node: ast.AST, *, at_top: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        yield from (Import(alias.name, at_top) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: a relative import hides where a name comes from"
        for alias in node.names:
            name = f"{node.module}.{alias.name}"
            yield Import(name if name.removeprefix("megalite.") in sources() else str(node.module), at_top)
    for child in ast.iter_child_nodes(node):
        yield from walk_imports(child, at_top=at_top and not is_deferred(node))


def is_deferred(node: ast.AST) -> bool:
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name):
        return node.test.id == "TYPE_CHECKING"
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def is_in(module: str, room: str) -> bool:
    return module == room or module.startswith(f"{room}.")


def ours(module: str, *, at_top: bool = False) -> set[str]:
    """The modules of the package that a module imports: anywhere in it, or as soon as it is imported itself."""
    names = {found.name.removeprefix("megalite.") for found in imports_of(module) if found.at_top or not at_top}
    return names & (sources().keys() - {""})


def importers_of(package: str) -> list[str]:
    return [module for module in sources() if any(is_in(found.name, package) for found in imports_of(module))]


def callers_of(*functions: str) -> list[str]:
    return [
        module
        for module, tree in sources().items()
        if any(isinstance(node, ast.Call) and ast.unparse(node.func) in functions for node in ast.walk(tree))
    ]


@pytest.mark.parametrize("module", [module for module in sources() if module])
def test_a_module_imports_only_what_its_room_may(module: str) -> None:
    rooms = [room for room in MAY_IMPORT if is_in(module, room)]
    assert rooms, f"megalite.{module} has no room: say in MAY_IMPORT what it may import"
    allowed = ("errors", *MAY_IMPORT[max(rooms, key=len)])
    stray = {name for name in ours(module) if not any(is_in(name, room) for room in allowed)}
    assert not stray, f"megalite.{module} imports {sorted(stray)}; its room may import {sorted(allowed)}"


def test_every_room_exists() -> None:
    gone = [room for room in MAY_IMPORT if not any(is_in(module, room) for module in sources())]
    assert not gone, f"MAY_IMPORT names {gone}, which are no more"


def test_no_module_imports_itself_by_a_detour() -> None:
    TopologicalSorter({module: ours(module) for module in sources() if module}).prepare()


def test_only_zero_imports_deepspeed() -> None:
    assert importers_of("deepspeed") == ["zero"]


def test_only_the_command_line_and_the_comparison_of_a_step_know_train() -> None:
    knowing = importers_of("megalite.train")
    assert [module for module in knowing if not is_in(module, "cli")] == ["parity.comparison"]


@pytest.mark.parametrize("package", PICKLES)
def test_nobody_imports_pickle(package: str) -> None:
    assert importers_of(package) == []


def test_nobody_calls_what_pickles_evaluates_or_prints() -> None:
    assert callers_of("torch.save", "eval", "exec", "os.system", "print") == []


def test_one_module_reads_torchs_files_and_by_the_restricted_reader() -> None:
    assert callers_of("torch.load", "load", "torch.serialization.load") == [TORCH_FILES]
    calls = [node for node in ast.walk(sources()[TORCH_FILES]) if isinstance(node, ast.Call)]
    (load,) = [call for call in calls if ast.unparse(call.func) == "torch.load"]
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in load.keywords}
    assert given.get("weights_only") == "True"
    assert None not in given, "**settings hide what torch.load is given"
    assert "pickle_module" not in given


@pytest.mark.parametrize("module", PURE_PIPELINE)
def test_the_pure_pipeline_knows_no_torch(module: str) -> None:
    assert [found.name for found in imports_of(module) if is_in(found.name, "torch")] == []


@pytest.mark.parametrize("module", [module for module in sources() if any(is_in(module, room) for room in LIGHT)])
def test_importing_a_light_module_imports_nothing_heavy(module: str) -> None:
    """Nor by a detour, packages on the way included."""
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        seen.add(name)
        heavy = {i.name for i in imports_of(name) if i.at_top and any(is_in(i.name, package) for package in HEAVY)}
        assert not heavy, f"megalite.{module} imports {sorted(heavy)} by way of megalite.{name}"
        around = {name.rpartition(".")[0]} - {""}
        waiting += (ours(name, at_top=True) | around) - seen
