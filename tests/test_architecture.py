"""Imports point towards the ground: the order of the packages, and rules for single ones, read from the source.

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

# From the ground to the roof: a package, or a module at the top, imports itself and what stands before it.
ORDER = (
    "errors",  # UserError, exit statuses
    "files",  # atomic writes, locks
    "registry",  # what a run file can name, plugins' own among it
    "paths",  # ~ and variables in paths
    "text_encoding",  # text that is no UTF-8
    "settings",  # sections of settings, kinds of values, faults
    "kernels",  # which implementation computes products and attention, random numbers from counters
    "parallel",  # layout, placement, mesh, sharding, regions of tensors
    "tensor_parallel",  # layers and collectives of the tensor axis
    "launch",  # ranks are started and find each other
    "pipeline",  # schedules as data, and what runs them
    "optim",  # optimizers and what they declare, parameter groups, learning rates
    "model",  # the families, the stage that they are built into, and what follows from it
    "config",  # the run file and the DeepSpeed JSON
    "slurm",  # batch scripts
    "data",  # from text to microbatches in host memory
    "checkpoint",  # the format on disk
    "convert",  # Hugging Face's and Megatron's formats
    "monitoring",  # metrics, heartbeats, the run's state and pictures
    "planning",  # what a run will need, checked before it starts
    "zero",  # the sharding engine on DeepSpeed
    "fsdp",  # the sharding engine on torch's FSDP2
    "generation",  # text from a model
    "training",  # one run: assembly, loop, saving, resuming
    "doctor",  # checks of machines
    "verify",  # one step of a layout against one process
    "api",  # a run from Python
    "cli",  # a thin file a verb
    "__main__",
)

PURE_PIPELINE = (
    "parallel.placement",
    *(f"pipeline.{name}" for name in ("instructions", "schedules", "partition", "timeline")),
)
HEAVY = ("torch", "deepspeed", "matplotlib")
LIGHT = (
    *("errors", "files", "paths", "registry", "settings", "text_encoding"),
    *("launch", "config", "slurm", "checkpoint", "convert", "cli"),
    *(f"parallel.{name}" for name in ("layout", "placement", "sharding", "regions", "network_interfaces")),
    *(
        f"model.{name}"
        for name in ("config", "families", "family", "formats", "recompute", "registry", "structure", "weights")
    ),
    *(f"optim.{name}" for name in ("registry", "parameter_groups", "learning_rate")),
    *(f"monitoring.{name}" for name in ("heartbeat", "run_folder", "run_state", "run_status", "stragglers")),
    *(f"planning.{name}" for name in ("plan", "preflight", "description", "memory_estimate", "finished")),
    *("training.stop_requests", "doctor.report"),
    *(f"verify.{name}" for name in ("layouts", "parity_report", "scaled_down", "table")),
    *PURE_PIPELINE,
)
NOT_LIGHT = (
    *("launch.rendezvous", "convert.logits_check"),
    *(f"model.families.{family}.layers" for family in ("llama", "gpt2", "gpt_neox")),
)
TORCH_FILES = "convert.megatron.torch_file"
PICKLES = ("pickle", "cloudpickle", "dill", "shelve", "marshal")


@dataclass(frozen=True)
class Import:
    """What an import statement names, and whether it runs as soon as its module is imported."""

    name: str
    at_top: bool


@cache
def sources() -> dict[str, ast.Module]:
    """Every module, by its name inside the package: ``pipeline.schedules``, and ``pipeline`` for the package's own."""
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


def is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


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


def is_light(module: str) -> bool:
    return any(is_in(module, name) for name in LIGHT) and module not in NOT_LIGHT


@cache
def loaded_by(module: str) -> frozenset[str]:
    """The modules that importing one imports, the packages around them and itself among them."""
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        seen.add(name)
        around = {name.rpartition(".")[0]} - {""}
        waiting += (ours(name, at_top=True) | around) - seen
    return frozenset(seen)


@pytest.mark.parametrize("module", [module for module in sources() if module])
def test_a_module_imports_only_towards_the_ground(module: str) -> None:
    own = module.split(".")[0]
    assert own in ORDER, f"megalite.{module}: say in ORDER where {own} stands"
    below = ORDER[: ORDER.index(own) + 1]
    stray = {name for name in ours(module) if name.split(".")[0] not in below}
    assert not stray, f"megalite.{module} imports {sorted(stray)}, which stand above {own} in ORDER"


def test_every_package_of_the_order_exists() -> None:
    gone = [package for package in ORDER if package not in sources()]
    assert not gone, f"ORDER names {gone}, which are no more"


def test_no_module_imports_itself_by_a_detour() -> None:
    TopologicalSorter({module: ours(module) for module in sources() if module}).prepare()


def test_only_zero_imports_deepspeed() -> None:
    assert [module for module in importers_of("deepspeed") if not is_in(module, "zero")] == []


def test_only_the_command_line_and_the_comparison_of_a_step_know_train() -> None:
    knowing = [module for name in ("train", "trainer") for module in importers_of(f"megalite.training.{name}")]
    assert [module for module in knowing if not is_in(module, "cli")] == ["api", "training.train", "verify.comparison"]


@pytest.mark.parametrize("module", [module for module in sources() if is_in(module, "monitoring")])
def test_what_observes_loads_no_engine(module: str) -> None:
    assert not {name for name in loaded_by(module) if is_in(name, "zero")}


@pytest.mark.parametrize("module", [module for module in sources() if is_in(module, "doctor")])
def test_the_doctor_loads_no_engine(module: str) -> None:
    assert not {name for name in loaded_by(module) if is_in(name, "zero")}


def test_a_resume_loads_no_foreign_format() -> None:
    assert not {name for name in loaded_by("training.resume") if is_in(name, "convert")}


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


@pytest.mark.parametrize("module", [module for module in sources() if any(is_in(module, p) for p in PURE_PIPELINE)])
def test_the_pure_pipeline_knows_no_torch(module: str) -> None:
    assert [found.name for found in imports_of(module) if is_in(found.name, "torch")] == []


@pytest.mark.parametrize("module", [module for module in sources() if is_light(module)])
def test_importing_a_light_module_imports_nothing_heavy(module: str) -> None:
    """Nor by a detour, packages on the way included."""
    for name in loaded_by(module):
        heavy = {i.name for i in imports_of(name) if i.at_top and any(is_in(i.name, package) for package in HEAVY)}
        assert not heavy, f"megalite.{module} imports {sorted(heavy)} by way of megalite.{name}"
