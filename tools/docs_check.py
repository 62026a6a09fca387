"""Run the commands and the Python scripts of README.md, docs/ and examples/ in a scratch folder, page by page.

    python tools/docs_check.py                          # every page
    python tools/docs_check.py docs/howto/verify.md     # some pages; the pages that they continue are run first
    python tools/docs_check.py --list                   # the commands, and the reasons for those left out

A command must end with status 0, or with 2 where the page shows a ``megalite: error``. Lines that a page shows and the
command does not print are reported, but are no error, since numbers and times differ; generated text is not compared.
The models of the run files are made narrow and trained in fp32, so that a laptop's processor is enough; steps, layouts
and commands are those of the page.

`LEFT_OUT` names the commands that cannot run here, with the reason. An entry that no page has any more is an error, and
so is a page of docs/ that has commands and no place in `PAGES`.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = (
    *("megalite", "make", "python", "deepspeed", "torchrun", "srun", "sbatch", "slurm/chain.sh"),
    *("mkdir", "touch", "echo", "printf", "ls", "tail", "cat", "cp", "pip"),
)
"""A line of a block without prompts is a command if it begins with one of these words."""
ARROW = "►"
"""A block with this sign is a drawing."""
_FILE = re.compile(r"# \S+\.(yaml|py)")
NARROW = {"hidden_size": 64, "intermediate_size": 176}
SECONDS = 900.0
USER_ERROR = "megalite: error: "


@dataclass(frozen=True)
class Command:
    """A command of a page: its line there, and what the page shows of its output."""

    page: str
    line: int
    text: str
    shown: tuple[str, ...] = ()
    script: str | None = None
    """A Python script of a page; `text` then names it by its first line."""

    @property
    def status(self) -> int:
        """The exit status that the page promises."""
        return 2 if any(line.startswith(USER_ERROR) for line in self.shown) else 0


# ---- what is on a page


def blocks(text: str) -> Iterator[tuple[int, str, list[str]]]:
    """Yield the fenced blocks of a page: the number of the first line inside, the language and the lines."""
    start, language, inside = 0, "", None
    for number, line in enumerate(text.splitlines(), 1):
        if not line.startswith("```"):
            if inside is not None:
                inside.append(line)
        elif inside is None:
            start, language, inside = number + 1, line[3:].strip(), []
        else:
            yield start, language, inside
            inside = None


def commands(page: str, text: str) -> list[Command]:
    """Return the commands of a page in their order: with prompts, each with its output, or one command per line."""
    found: list[Command] = []
    for start, language, lines in blocks(text):
        if language == "python" and not _FILE.fullmatch(lines[0]):
            found.append(Command(page, start, f"Python: {lines[0]}", script="\n".join(lines)))
        if language not in ("", "sh", "bash", "console") or any(ARROW in line for line in lines):
            continue
        prompts = any(line.startswith("$ ") for line in lines)
        at = 0
        while at < len(lines):
            number, line = start + at, lines[at]
            at += 1
            if prompts and not line.startswith("$ "):
                if found and found[-1].page == page and line.strip() not in ("", "..."):
                    last = found.pop()
                    found.append(Command(page, last.line, last.text, (*last.shown, line)))
                continue
            line = line.removeprefix("$ ")
            while line.endswith("\\") and at < len(lines):
                line, at = f"{line[:-1].rstrip()} {lines[at].strip()}", at + 1
            line = re.sub(r"\s+# .*", "", line).strip()
            if prompts or line.partition(" ")[0] in PROGRAMS:
                found.append(Command(page, number, line))
    return found


def page_files(text: str) -> dict[str, str]:
    """Return the run files and modules of a page by name, which the first line of the block gives: ``# NAME.yaml``."""
    return {
        lines[0].removeprefix("# "): "\n".join(lines)
        for _, language, lines in blocks(text)
        if language in ("yaml", "python") and _FILE.fullmatch(lines[0])
    }


# ---- what a page assumes


def narrow(file: Path) -> None:
    """Make the model of a run file narrow, if it states one, and its sequences short."""
    content: dict[str, Any] = yaml.safe_load(file.read_text())
    if "model" in content:
        content["model"] |= NARROW
    content["data"]["sequence_length"] = 32
    file.write_text(yaml.safe_dump(content, sort_keys=False))


def check_out(here: Path) -> None:
    """Lay out what a reader has of the repository."""
    for name in ("configs", "examples", "slurm", "tools"):
        shutil.copytree(ROOT / name, here / name, ignore=shutil.ignore_patterns("__pycache__"))
    narrow(here / "examples/quickstart/run.yaml")
    for settings in (here / "examples/quickstart/zero1_bf16.json", here / "configs/deepspeed/zero1_bf16.json"):
        content = json.loads(settings.read_text())
        settings.write_text(json.dumps(content | {"bf16": {"enabled": False}}))


def corpus(here: Path) -> None:
    """Lay out the folder of text of the guide."""
    build = [sys.executable, "examples/quickstart/build_corpus.py", "--output", "corpus/text.jsonl"]
    subprocess.run(build, cwd=here, check=True, stdout=subprocess.DEVNULL)


def conversations(here: Path) -> None:
    questions = {"What is a list?": "A sequence that can change.", "What is a tuple?": "A sequence that is fixed."}
    with (here / "chats.jsonl").open("w") as file:
        for question, answer in questions.items():
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(f"{json.dumps({'messages': messages})}\n" * 500)


def prompts(here: Path) -> None:
    lines = (json.dumps({"prompt": prompt}) for prompt in ("The class", "If the file"))
    (here / "prompts.jsonl").write_text("".join(f"{line}\n" for line in lines))


def nothing(here: Path) -> None:
    pass


@dataclass(frozen=True)
class Page:
    """A page; `after` is the page whose folder it continues, `prepare` lays out further files of the reader's."""

    path: str
    after: str | None = None
    prepare: Callable[[Path], None] = nothing


TUTORIAL, GUIDE = "docs/tutorial.md", "docs/howto/pretrain.md"
PAGES = (
    Page(TUTORIAL),
    Page("README.md", after=TUTORIAL),
    Page("docs/install.md", after=TUTORIAL),
    Page("docs/reference/checkpoint_format.md", after=TUTORIAL),
    Page("docs/reference/python_api.md", after=TUTORIAL),
    Page("docs/howto/generate.md", after=TUTORIAL, prepare=prompts),
    Page("docs/howto/extend.md", after=TUTORIAL),
    Page("docs/howto/pretrain_7b.md"),
    Page("docs/concepts/schedules.md"),
    Page("docs/reference/megatron_checkpoints.md"),
    Page(GUIDE, after=TUTORIAL, prepare=corpus),
    Page("docs/howto/fine_tune.md", after=GUIDE, prepare=conversations),
    Page("docs/howto/prepare_data.md", after=GUIDE),
    Page("docs/howto/convert.md", after=GUIDE),
    Page("docs/howto/clusters.md", after=GUIDE),
    Page("docs/howto/resume_and_recover.md", after=GUIDE),
    Page("docs/howto/doctor.md", after=GUIDE),
    Page("docs/howto/verify.md", after=GUIDE),
    Page("docs/howto/move_from_others.md", after=GUIDE),
    Page("docs/howto/add_a_model_family.md", after=GUIDE),
    Page("docs/reference/command_line.md", after=GUIDE),
)

SLURM = "needs Slurm"
NODES = "needs several nodes"
CORPUS = "needs a corpus of terabytes"
FORM = "has places to fill in"
OTHERS = "needs a model or a tokenizer that is not in the repository"
EIGHT = "needs eight processors"
NETWORK = "installs from the network"
TRAINED = "is a command of docs/tutorial.md, which README continues"
CORPUS_FILE = "data/quickstart/corpus.jsonl"
LEFT_OUT = {
    "README.md": {
        "make quickstart": "is the commands of docs/tutorial.md, into an environment of its own",
        "make test": "is the tests",
        f"python examples/quickstart/build_corpus.py --output {CORPUS_FILE}": TRAINED,
        f"megalite tokenizer train {CORPUS_FILE} --vocab-size 8192 --output data/quickstart/tokenizer.model"
        " --force": TRAINED,
        f"megalite preprocess {CORPUS_FILE} --tokenizer data/quickstart/tokenizer.model --output"
        " data/quickstart/corpus --append-eod --workers 2 --force": TRAINED,
        "megalite train examples/quickstart/run.yaml": TRAINED,
    },
    "docs/install.md": {
        "make install": NETWORK,
        "pip install -c constraints.txt -e .": NETWORK,
    },
    "docs/howto/pretrain_7b.md": {
        "megalite tokenizer train /corpus/jsonl --vocab-size 32000 --output data/llama_7b/tokenizer.model": CORPUS,
        "megalite preprocess /corpus/jsonl --tokenizer data/llama_7b/tokenizer.model --output data/llama_7b/corpus"
        " --append-eod --workers 64": CORPUS,
        "deepspeed --hostfile hostfile --module megalite train examples/pretrain_llama_7b/run.yaml": NODES,
        "torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint node0:29500 -m megalite train"
        " examples/pretrain_llama_7b/run.yaml": NODES,
        "megalite train examples/pretrain_llama_7b/run.yaml": NODES,
        "deepspeed --hostfile hostfile --module megalite train examples/pretrain_llama_7b/run.yaml"
        " run.dir=runs/measure train.stop_after=50": NODES,
    },
    GUIDE: {
        "srun python -m megalite train run.yaml": SLURM,
        "megalite slurm run.yaml --nodes 2 --launcher torchrun": SLURM,
    },
    "docs/howto/resume_and_recover.md": {
        "touch runs/mine/STOP": "needs a run that trains at the same time",
        "megalite status runs/mine": "needs a run that was stopped, or that died",
    },
    "docs/howto/clusters.md": {
        "make install && . .venv/bin/activate": NETWORK,
        "megalite slurm run.yaml --nodes 2 --ranks-per-node 8 --gpus-per-node 8 --time 24:00:00"
        " parallel.data=auto": SLURM,
        "tail -F logs/mine/*.log": "does not end",
        "sbatch --nodes 2 --ntasks-per-node 8 slurm/srun.sbatch runs/mine run.yaml train.steps=1000": SLURM,
        "slurm/chain.sh 5 mine --nodes 2 --ntasks-per-node 8 slurm/srun.sbatch runs/mine run.yaml": SLURM,
        "sbatch --array 0-15 --cpus-per-task 8 slurm/preprocess_array.sbatch tok.model data/corpus"
        " corpus/*.jsonl.zst": SLURM,
    },
    "docs/howto/convert.md": {
        "megalite convert runs/small exported --verify": "the commands of docs/howto/pretrain.md convert a run",
        "ls exported": "the commands of docs/howto/pretrain.md convert a run",
        "megalite convert Llama-small checkpoints/llama-small --verify": OTHERS,
        "megalite convert broken checkpoints/broken": OTHERS,
    },
    "docs/howto/prepare_data.md": {
        "megalite preprocess INPUT... --tokenizer TOKENIZER --output PREFIX [--workers N]": FORM,
        "megalite preprocess chats.jsonl --chat chatml --tokenizer tokenizer.json --output data/chat": OTHERS,
    },
    "docs/howto/doctor.md": {
        "torchrun --nproc_per_node 8 -m megalite doctor run.yaml": EIGHT,
        "deepspeed --num_accelerators 8 --module megalite doctor run.yaml": EIGHT,
        "srun python -m megalite doctor": SLURM,
    },
    "docs/howto/generate.md": {"megalite generate MODEL --prompt TEXT": FORM},
    "docs/reference/megatron_checkpoints.md": {
        "megalite convert megatron-checkpoints converted": OTHERS,
        """echo '{"vocab_size": 45}' > megatron-checkpoints/iter_0001000/model.json""": OTHERS,
        "megalite convert megatron-checkpoints hf --to hf --verify": OTHERS,
    },
    "docs/howto/verify.md": {
        "deepspeed --num_accelerators 8 --module megalite verify run.yaml": EIGHT,
        "torchrun --nproc_per_node 8 -m megalite verify run.yaml": EIGHT,
        "srun python -m megalite verify run.yaml": SLURM,
    },
}


def of_page(path: str) -> list[Command]:
    """Return the commands of a page of this repository."""
    return commands(path, (ROOT / path).read_text())


def faults() -> list[str]:
    """Return what is wrong with the tables above: pages that are missing, and entries that no page has any more."""
    pages = {page.path for page in PAGES}
    files = [*ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*/*.md")]
    others = sorted({str(file.relative_to(ROOT)) for file in files} - pages)
    found = [f"{path}: has commands and is not in PAGES" for path in others if of_page(path)]
    for path in sorted({*pages, *LEFT_OUT}):
        if not (ROOT / path).is_file():
            found.append(f"{path}: is no page any more")
            continue
        there = {command.text for command in of_page(path)}
        gone = [text for text in LEFT_OUT.get(path, {}) if text not in there]
        found += [f"{path}: LEFT_OUT names {text!r}, which is not there" for text in gone]
    return found


# ---- the run


def run(command: Command, here: Path) -> tuple[int, str]:
    """Run a command as a shell would, or a script; return its exit status and its output."""
    done = subprocess.run(
        ["sh", "-c", command.text] if command.script is None else [sys.executable, "-c", command.script],
        cwd=here,
        env=os.environ
        | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])}
        | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    return done.returncode, done.stdout


def unsaid(command: Command, said: str) -> list[str]:
    """Return the lines that the page shows and no line of the output has the words of."""
    lines = [set(_words(line)) for line in said.splitlines()]
    return [line for line in command.shown if not any(set(_words(line)[:3]) <= words for words in lines)]


def _words(line: str) -> list[str]:
    return re.findall(r"[A-Za-z][A-Za-z_-]{2,}", line)


def check(page: Page, here: Path) -> int:
    """Run a page's commands in a folder; return how many did not do what the page says."""
    wrong = 0
    page.prepare(here)
    for name, content in page_files((ROOT / page.path).read_text()).items():
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).write_text(content)
        if name.endswith(".yaml"):
            narrow(here / name)
    for command in of_page(page.path):
        if (reason := LEFT_OUT.get(page.path, {}).get(command.text)) is not None:
            print(f"left out  {page.path}:{command.line}: {command.text}: {reason}", flush=True)
            continue
        began = time.monotonic()
        try:
            status, said = run(command, here)
        except subprocess.TimeoutExpired:
            status, said = 124, f"it had not ended after {SECONDS:g} s"
        fine = status == command.status
        wrong += not fine
        mark = "ok      " if fine else "WRONG   "
        print(f"{mark}  {page.path}:{command.line}: {command.text} ({time.monotonic() - began:.0f} s)", flush=True)
        if not fine:
            print(f"          status {status}, not {command.status}; it said at the end:")
            print("".join(f"          | {line}\n" for line in said.splitlines()[-12:]), flush=True)
        for line in unsaid(command, said) if fine and " generate " not in command.text else ():
            print(f"          not said: {line}", flush=True)
    return wrong


def main(argv: Sequence[str] | None = None) -> int:
    """Check the pages named, or all; return 1 where a command or a table is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", metavar="PAGE", choices=[[], *(page.path for page in PAGES)])
    parser.add_argument("--list", action="store_true", help="show the commands, and run none")
    given = parser.parse_args(argv)
    wanted = set(given.pages) or {page.path for page in PAGES}
    wrong = faults()
    for fault in wrong:
        print(f"WRONG     {fault}")
    if given.list:
        for page in PAGES:
            for command in of_page(page.path) if page.path in wanted else ():
                reason = LEFT_OUT.get(page.path, {}).get(command.text)
                print(f"{command.page}:{command.line}: {command.text}" + (f": left out, {reason}" if reason else ""))
        return int(bool(wrong))
    needed = wanted | {page.after for page in PAGES if page.path in wanted and page.after is not None}
    count = len(wrong)
    with tempfile.TemporaryDirectory(prefix="megalite-docs-") as scratch:
        for page in PAGES:
            if page.path not in needed:
                continue
            here = Path(scratch, page.path.replace("/", "_"))
            if page.after is None:
                check_out(here)
            else:
                shutil.copytree(Path(scratch, page.after.replace("/", "_")), here, symlinks=True)
            count += check(page, here)
    print(f"{count} wrong" if count else "every command does what its page says")
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main())
