"""Plugins: the modules that a run file names, imported before the rest of it is read, in every process of the run."""

import importlib
import re
import sys
import traceback
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from megalite.errors import did_you_mean
from megalite.settings.validation import Fault, Origin, report, show
from megalite.settings.values import Kind, Unfit


def _modules(value: Any) -> list[str]:
    if isinstance(value, str):
        raise Unfit(f" is not a list; write [{value}]")
    if not isinstance(value, list | tuple) or not all(map(_is_module, value)):
        raise ValueError
    return list(value)


def _is_module(name: object) -> bool:
    return isinstance(name, str) and re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", name) is not None


PLUGINS = Kind("a list of names of Python modules, such as [my_package]", _modules)


def import_plugins(names: object, origin: Origin) -> None:
    """Import the modules of the key `plugins`, so that they register what the run file names.

    They are found in the environment, and in the working directory, as with ``python -m``. Names of a wrong kind are
    left to the validation. Raises UserError for modules that are missing or fail, a line each.
    """
    if not names or not isinstance(names, list) or not all(map(_is_module, names)):
        return
    here = str(Path.cwd())
    if not sys.flags.safe_path and here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)  # the ranks, which are started with `python -m`, have it there
    failures = [(index, name, _failure(name)) for index, name in enumerate(names)]
    report([origin.line(Fault(("plugins", index), f"={show(name)} {text}")) for index, name, text in failures if text])


def plugin_code(name: str) -> Path:
    """Return the folder of an imported plugin, or its file where it is a single module."""
    module = sys.modules[name]
    file = Path(module.__file__ or next(iter(module.__path__)))
    return file.parent if file.name == "__init__.py" else file


def _failure(name: str) -> str | None:
    """Import a module; return the words that follow its name in the message where that fails."""
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            return _missing(name)
        return _raised(name, error)
    except (Exception, SystemExit) as error:
        return _raised(name, error)
    return None


def _missing(name: str) -> str:
    if name.endswith(".py"):
        return f"is the name of a file; write the module's name, {name.removesuffix('.py')!r}"
    where = f"is neither installed nor in the working directory {Path.cwd()}"
    near = did_you_mean(name, [module.name for module in iter_modules([str(Path.cwd())])])
    return f"{where}{near or '; install it, or start from the folder that has it'}"


def _raised(name: str, error: BaseException) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    at = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return f"cannot be imported: {text}{at}; `python -c 'import {name}'` shows the whole traceback"
