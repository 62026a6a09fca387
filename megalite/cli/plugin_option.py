"""The option ``--plugin`` of verbs that open a model without a run file, which would name its plugins."""

from collections.abc import Sequence
from typing import Annotated

import typer

Plugins = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        metavar="MODULE",
        help="A Python module that registers the model's family; may be given several times.",
        show_default=False,
    ),
]


def load_plugins(modules: Sequence[str] | None) -> None:
    """Import modules as the key `plugins` of a run file does; raise UserError for those that cannot be imported."""
    from megalite.config.plugins import import_plugins
    from megalite.settings.validation import Origin

    import_plugins(list(modules or ()), Origin("--plugin"))
