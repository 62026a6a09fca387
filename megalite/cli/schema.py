"""``megalite schema``: the JSON schema of the run file."""

import json

import typer

from megalite.cli.plugin_option import Plugins, load_plugins


def register(app: typer.Typer) -> None:
    """Add the verb to the app."""
    app.command(name="schema")(_schema)


def _schema(plugin: Plugins = None) -> None:
    """Print the JSON schema of the run file, with which an editor completes keys and marks mistakes.

    Write it to a file, and name the file in the first line of a run file:

    # yaml-language-server: $schema=run_file.schema.json
    """
    from megalite.config.schema import run_file_schema

    load_plugins(plugin)
    typer.echo(json.dumps(run_file_schema(), indent=2))
