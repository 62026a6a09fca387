"""A trainer for large Transformers. Its public names are loaded when they are first used, since torch takes seconds."""

TYPE_CHECKING = False  # not from typing, whose import takes longer than that of this package
if TYPE_CHECKING:
    from megalite.api import RunResult, train
    from megalite.config import RunConfig, load_run_config
    from megalite.data.registered import TokenDataset, TokenSample, register_dataset
    from megalite.errors import RunFailed, UserError
    from megalite.model.family import Family
    from megalite.model.loss import register_loss
    from megalite.model.registry import register_family
    from megalite.monitoring.callback import Callback, RunEnd, RunStart, register_callback
    from megalite.monitoring.step_report import StepReport

    __version__: str

_MODULES = {
    **dict.fromkeys(("RunResult", "train"), "api"),
    **dict.fromkeys(("RunConfig", "load_run_config"), "config"),
    **dict.fromkeys(("TokenDataset", "TokenSample", "register_dataset"), "data.registered"),
    **dict.fromkeys(("RunFailed", "UserError"), "errors"),
    "Family": "model.family",
    "register_loss": "model.loss",
    "register_family": "model.registry",
    **dict.fromkeys(("Callback", "RunEnd", "RunStart", "register_callback"), "monitoring.callback"),
    "StepReport": "monitoring.step_report",
}
__all__ = [
    "Callback",
    "Family",
    "RunConfig",
    "RunEnd",
    "RunFailed",
    "RunResult",
    "RunStart",
    "StepReport",
    "TokenDataset",
    "TokenSample",
    "UserError",
    "__version__",
    "load_run_config",
    "register_callback",
    "register_dataset",
    "register_family",
    "register_loss",
    "train",
]


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("megalite")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
