"""The command line: one thin file a verb, over the library.

Each file has a `register` that adds its verbs to the app, and imports what a verb needs only when it runs, so that
``megalite --help`` answers at once.
"""

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from megalite.cli import convert, doctor, generate, inspect, preprocess, schema, slurm, status, tokenizer, train, verify
from megalite.cli.argument_paths import expand_paths
from megalite.cli.exit import leave, named_stdout, say_failure, say_lost_output, say_user_error, stdout_refused
from megalite.errors import USER_ERROR_STATUS, CommonError, RanksMissing, UserError, nearest
from megalite.launch import LaunchEnvironment, launch_environment

# Some versions of typer carry a click of their own: whichever it is, this is its UsageError.
_UsageError: Any = typer.BadParameter.__base__


class _Verbs(TyperGroup):
    """Names the nearest verb where there is none of that name."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        word = args[0]
        if word not in self.commands and not word.startswith("-"):
            raise UserError(f"there is no verb {word!r}{nearest(word, self.commands)}")
        return super().resolve_command(ctx, args)


def build_app() -> typer.Typer:
    """Return the typer app with every verb."""
    app = typer.Typer(
        cls=_Verbs,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_megalite)
    for verbs in (tokenizer, preprocess, doctor, train, slurm, status, verify, inspect, generate, convert, schema):
        verbs.register(app)
    for command in app.registered_commands:
        command.help = _paragraphs(command.callback.__doc__ or "")
    expand_paths(app)
    return app


def _paragraphs(docstring: str) -> str:
    """A docstring with each paragraph on a line: the console has a width of its own."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in docstring.split("\n\n"))


def _show_version(asked: bool) -> None:
    """Answer before click misses a verb."""
    if asked:
        from megalite import __version__

        typer.echo(f"megalite {__version__}")
        raise typer.Exit


def _megalite(
    _: Annotated[
        bool, typer.Option("--version", help="Show the version.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Train large Transformers: tensor, pipeline and ZeRO data parallelism composed, on a laptop as on a cluster."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit status: 0, 2 for an error of the user's, 75 after a stop, 1 for other failures.

    A rank does not return, it leaves at once: an orderly exit after a failure may wait for its peers, and one after a
    success may meet a thread of torch that still asks for the interpreter, which aborts the process.
    """
    arguments = _without_local_rank(sys.argv[1:] if argv is None else argv)
    rank = _who_am_i()
    try:
        with named_stdout():
            status = build_app()(arguments or ["--help"], prog_name="megalite", standalone_mode=False) or 0
    except (UserError, _UsageError) as error:
        say_user_error(_message(error), rank, common=isinstance(error, CommonError))
        status = USER_ERROR_STATUS
    except Exception as error:
        if stdout_refused(error):
            say_lost_output(error)
        elif rank is None:
            raise
        else:
            say_failure(rank, str(error) if isinstance(error, RanksMissing) else traceback.format_exc())
        status = 1
    if rank is not None:
        leave(status)
    return status


def _without_local_rank(argv: Sequence[str]) -> list[str]:
    """Drop the option that the deepspeed launcher puts in front; LOCAL_RANK says the same."""
    head, *rest = argv or [""]
    name, equals, _ = head.partition("=")
    if name in ("--local_rank", "--local-rank"):
        return rest if equals else rest[1:]
    return list(argv)


def _who_am_i() -> LaunchEnvironment | None:
    try:
        return launch_environment(os.environ)
    except UserError:
        return None  # The verbs that run as ranks will say so; the others do not mind.


def _message(error: Any) -> str:
    if not isinstance(error, _UsageError):
        return str(error)
    return error.format_message().rstrip(".") + (f"; see {error.ctx.command_path} --help" if error.ctx else "")
