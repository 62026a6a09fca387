"""A run's folder without a checkpoint, wherever a model is asked for: what it is, its state, and what to do."""

from pathlib import Path

import pytest
from commands import TINY

from megalite.cli import main
from megalite.convert.open import open_weights
from megalite.errors import UserError
from megalite.monitoring.run_state import RunStateWriter

VERBS = {
    "generate": ("generate", "{}", "--prompt", "a"),
    "convert": ("convert", "{}", "out"),
    "inspect": ("inspect", "{}"),
    "verify": ("inspect", "{}", "--verify"),
}


def write_config(folder: Path, run_file: Path, *settings: str) -> None:
    from megalite.planning.plan import prepare

    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(prepare(run_file, [*TINY, *settings], None).config.to_yaml())


def refusal(verb: str, path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main([word.format(path) for word in VERBS[verb]]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("verb", VERBS)
def test_the_run_and_its_state_are_named(
    verb: str, tmp_path: Path, run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    RunStateWriter(run, "this", ranks=4, steps=10).starting("building the model")
    error = refusal(verb, run, capsys)
    assert error.startswith(f"megalite: error: {run}: no checkpoint yet: a run keeps one at its last step")
    assert "starting" in error
    assert f"megalite status {run}" in error

    (run / "STATE.json").unlink()
    write_config(run, run_file, "checkpoint.every=3")
    (run / "metrics.jsonl").write_text('{"step": 2, "loss": 1, "tokens_per_second": 1, "step_seconds": 1}\n')
    error = refusal(verb, run, capsys)
    assert "every 3 steps and at the last step" in error
    assert "dead, at step 2 of 10: start it again" in error
    assert ("--step N" in error) == (VERBS[verb][0] == "inspect")

    write_config(run, run_file, "checkpoint.every=0", "checkpoint.last=false")
    (run / "DONE.json").write_text("{}")
    error = refusal(verb, run, capsys)
    assert "checkpoint.every=0 and checkpoint.last=false" in error
    assert "done" in error
    assert "checkpoint.last=true" in error


def test_the_folder_of_a_runs_checkpoints_is_the_runs(tmp_path: Path, run_file: Path) -> None:
    write_config(tmp_path, run_file, "checkpoint.every=3")
    (tmp_path / "checkpoints" / "step_3.tmp").mkdir(parents=True)
    for path in (tmp_path, tmp_path / "checkpoints"):
        with pytest.raises(UserError) as raised:
            open_weights(path)
        assert str(raised.value).startswith(f"{path}: no checkpoint yet: ")
        assert "step_3.tmp" in str(raised.value)
        assert f"`megalite status {tmp_path}`" in str(raised.value)


def test_another_folder_with_a_config_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: megatron_gpt\n")
    with pytest.raises(UserError, match="holds no model"):
        open_weights(tmp_path)
