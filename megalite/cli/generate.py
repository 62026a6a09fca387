"""``megalite generate``: continue prompts with a trained model, in this process or on ranks that share it."""

import faulthandler
import os
import shutil
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megalite.cli.generate_output import audience, nobody, summary
from megalite.cli.plugin_option import Plugins, load_plugins
from megalite.cli.progress import byte_progress
from megalite.errors import USER_ERROR_STATUS, UserError
from megalite.launch import LaunchEnvironment, die_with_parent, launch_environment, launch_local

if TYPE_CHECKING:
    from megalite.generation.request import Job

_INTERRUPTED = 130


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("generate")(generate)


def generate(
    context: typer.Context,
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A checkpoint, a run's folder or a Hugging Face folder.")
    ],
    prompt: Annotated[
        list[str] | None, typer.Option(help="A text to continue; may be given several times.", show_default=False)
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help='A file of prompts: a text a line, or .jsonl with {"prompt": ...} a line.')
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens that follow a prompt.")] = 64,
    temperature: Annotated[
        float | None, typer.Option(help="Logits are divided by it; 0.8 unless given, 0: as --greedy.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from the K likeliest tokens only.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the fewest tokens whose probabilities reach P only.")
    ] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Draw nothing: always the likeliest token.")] = False,
    seed: Annotated[int, typer.Option(help="What is drawn follows from it.")] = 1234,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="End before this text, or at the control token of this name; may be given several times."),
    ] = None,
    tensor: Annotated[
        int | None, typer.Option(help="Ranks that share the model; 1, or those of the launcher, unless given.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="fp32, bf16 or fp16; unless given, what the model was trained or stored in.")
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="In place of the tokenizer beside the weights.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts that are continued together.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="A line of JSON for each prompt.")] = False,
    output: Annotated[Path | None, typer.Option(help="Write the texts to this file, not to the console.")] = None,
    plugin: Plugins = None,
) -> None:
    """Continue texts with a trained model.

    The text of a single prompt appears as it is made. Started by hand with --tensor 2, it launches two ranks on this
    machine that share the model; started by a launcher, it takes its place among the ranks.
    """
    # A token is hundreds of small operations; threads that spin between them starve each other where cores are shared.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    environment = launch_environment(os.environ)
    if environment is not None:
        # Before the imports, which take seconds in which the launcher may be killed.
        die_with_parent()
        faulthandler.enable()
        os.environ.update(environment.variables())
    from megalite.cli.run_without_checkpoint import require_checkpoint
    from megalite.files import require_writable_folder
    from megalite.generation.prompts import read_prompts
    from megalite.generation.request import Limits, Sampling, prepare

    load_plugins(plugin)
    require_checkpoint(model)
    job = prepare(
        model,
        read_prompts(prompt or [], prompts),
        sampling=Sampling(_temperature(temperature, greedy), top_k, top_p, seed),
        limits=Limits(max_new_tokens, tuple(stop or ())),
        tensor=_tensor_size(tensor, environment),
        precision=dtype,
        tokenizer=tokenizer,
    )
    if output is not None:
        require_writable_folder(output.parent, f"--output={output}", "give another --output")
    if environment is None and job.tensor > 1:
        raise typer.Exit(_launch(context, job.tensor))
    _be_a_rank(job, environment, batch_size, as_json, output)


def _temperature(temperature: float | None, greedy: bool) -> float:
    if greedy and temperature:
        raise UserError(f"--greedy: stands beside --temperature={temperature}; keep one of them")
    return 0.0 if greedy else 0.8 if temperature is None else temperature


def _tensor_size(tensor: int | None, environment: LaunchEnvironment | None) -> int:
    if environment is None:
        return 1 if tensor is None else tensor
    ranks = environment.world_size
    if tensor not in (None, ranks):
        raise UserError(
            f"--tensor={tensor}: {environment.launcher} started {ranks} ranks; start {tensor}, or leave it out"
        )
    return ranks


def _launch(context: typer.Context, size: int) -> int:
    logs = Path(tempfile.mkdtemp(prefix="megalite-generate-"))
    status = launch_local(_words(context), size, logs)
    if status in (0, USER_ERROR_STATUS, _INTERRUPTED):  # else the last line has named them
        shutil.rmtree(logs, ignore_errors=True)
    return status


def _words(context: Any) -> list[str]:
    """Return the command line that gives a rank what this one was given."""
    words, arguments = ["generate"], ["--"]
    for parameter in context.command.params:
        value = context.params.get(parameter.name)
        if parameter.param_type_name == "argument":
            arguments.append(str(value))
        elif value is True:
            words.append(parameter.opts[0])
        elif value is not None and value is not False:
            values = value if isinstance(value, list | tuple) else [value]
            words += [f"{parameter.opts[0]}={one}" for one in values]
    return words + arguments


def _be_a_rank(
    job: "Job", environment: LaunchEnvironment | None, batch_size: int, as_json: bool, output: Path | None
) -> None:
    from megalite.generation.distributed import tensor_group
    from megalite.generation.generator import load_generator
    from megalite.generation.sequence import Continuation

    rows = [Continuation(job, number) for number in range(len(job.prompts))]
    speaks = environment is None or environment.rank == 0
    with tensor_group(environment) as (group, device):
        with byte_progress("loading") as progress:
            generator = load_generator(job, group, device, progress if speaks else None)
        started = time.perf_counter()
        with audience(job, as_json, output) if speaks else nullcontext(nobody) as hear:
            for start in range(0, len(rows), batch_size):
                generator.run(rows[start : start + batch_size], hear)
    if speaks:
        typer.echo(summary(rows, time.perf_counter() - started), err=True)
