"""Parameter groups by name pattern: which group a parameter is in, and every group that is refused."""

from pathlib import Path

import pytest
from training import NARROW

from megalite.errors import UserError
from megalite.planning.parameter_count import ParameterCounts
from megalite.planning.plan import Plan, prepare


def plan(run_file: Path, groups: str, *more: str) -> Plan:
    return prepare(
        run_file, [*NARROW, f"train.optimizer={{lr: 0.1, weight_decay: 0.1, groups: {groups}}}", *more], None
    )


def test_the_first_group_that_matches_counts(run_file: Path) -> None:
    groups = "[{match: 'layers.0.mlp.*', lr_scale: 2.0, weight_decay: 0.5}, {match: 'layers.[01].*', frozen: true}]"
    settings = plan(run_file, groups).parameter_settings
    mlp, norm = settings["layers.0.mlp.up.weight"], settings["layers.0.attention_norm.weight"]
    assert (mlp.frozen, mlp.lr_scale, mlp.weight_decay) == (False, 2.0, 0.5)
    assert norm.frozen
    assert settings["layers.1.mlp.up.weight"].frozen
    other = settings["layers.2.mlp.up.weight"]
    assert (other.frozen, other.lr_scale, other.weight_decay) == (False, 1.0, 0.1)
    assert settings["layers.2.mlp_norm.weight"].weight_decay == 0.0


AT = "train.optimizer.groups"
REFUSED = [
    (
        "[{match: 'layer.0.*', frozen: true}]",
        "{}.0.match='layer.0.*' matches no parameter .*; did you mean 'layers.0.*'",
    ),
    (
        "[{match: 'zzz', frozen: true}]",
        "{}.0.match='zzz' matches no parameter .*such as embedding.tokens",
    ),
    (
        "[{match: '*', lr_scale: 2}, {match: 'layers.*', frozen: true}]",
        "{}.1.match='layers.*' matches only parameters ",
    ),
    ("[{match: '*norm.weight', weight_decay: 1}]", "{}.0.match=.* matches only norms and biases, which never decay"),
    ("[{match: '*', frozen: true}]", "{}.0.match='.' leaves no parameter to train"),
    ("[{match: '*'}]", "{}.0 sets nothing"),
    ("[{match: '*', frozen: true, lr_scale: 2}]", "{}.0.lr_scale=2.0 belongs to parameters that are trained"),
    ("[{match: '*', frozne: true}]", "{}.0.frozne is not a key; did you mean .*frozen"),
    ("[{frozen: true}]", "{}.0.match is missing; write a string"),
    (
        "[{match: '*query.weight', frozen: true}]",
        "{}: layers.0.attention.query.weight and layers.0.attention.key.w",
    ),
]


@pytest.mark.parametrize(("groups", "message"), REFUSED, ids=[groups for groups, _ in REFUSED])
def test_groups_that_cannot_be_meant_are_refused(run_file: Path, groups: str, message: str) -> None:
    with pytest.raises(UserError, match=message.format(AT)):
        plan(run_file, groups)


def test_a_rate_of_its_own_does_not_go_with_deepspeeds_scheduler(run_file: Path) -> None:
    scheduler = "deepspeed.scheduler={type: WarmupLR, params: {warmup_num_steps: 2}}"
    with pytest.raises(UserError, match=f"{AT}.0.lr_scale=2.0 stands beside .*write train.schedule in place"):
        plan(run_file, "[{match: 'layers.0.*', lr_scale: 2}]", scheduler, "train.schedule=null")


def test_groups_stand_beside_the_optimizer_of_a_deepspeed_json(run_file: Path, tmp_path: Path) -> None:
    given = [
        "train.optimizer={groups: [{match: 'layers.0.*', frozen: true}]}",
        "deepspeed.optimizer={type: Lion, params: {lr: 0.25}}",
    ]
    config = prepare(run_file, given, None).config
    assert (config.optimizer.name, config.optimizer.lr, config.optimizer.betas) == ("lion", 0.25, (0.9, 0.999))
    assert config.optimizer.groups[0].frozen
    again = tmp_path / "again.yaml"
    again.write_text(config.to_yaml())
    assert prepare(again, [], None).config.optimizer == config.optimizer


def test_two_optimizers_are_refused(run_file: Path) -> None:
    given = ["train.optimizer={name: lion}", "deepspeed.optimizer={type: AdamW, params: {lr: 0.25}}"]
    with pytest.raises(UserError, match="train.optimizer.name='lion' disagrees with .*optimizer.type='AdamW'; write"):
        prepare(run_file, given, None)


def test_memory_and_disk_space_count_what_is_trained(run_file: Path) -> None:
    whole, frozen = plan(run_file, "[]"), plan(run_file, "[{match: 'layers.0.*', frozen: true}]")
    lion = prepare(run_file, [*NARROW, "train.optimizer={name: lion}"], None)
    held = [ParameterCounts(found).of_rank(0) for found in (whole, frozen)]
    trained = [ParameterCounts(found).of_rank(0, trained=True) for found in (whole, frozen)]
    layer = held[0] - trained[1]
    assert trained == [held[0], held[1] - layer]
    assert layer > 0
    assert whole.checkpoint_bytes - frozen.checkpoint_bytes == 8 * layer
    assert whole.checkpoint_bytes - lion.checkpoint_bytes == 4 * trained[0]
