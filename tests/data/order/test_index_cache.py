import json
import multiprocessing
import os
import random
import shutil
import signal
import time

import numpy as np
import pytest

from megalite.data.order import index_cache
from megalite.data.order.index_cache import cached_arrays
from megalite.errors import UserError

FACTS = {"seed": 1, "name": "é"}


def arrays():
    return {"small": np.arange(100, dtype=np.uint32), "wide": np.arange(6, dtype=np.int64).reshape(3, 2)}


def never():
    raise AssertionError("was built, though it is kept")


def same(found):
    return all((found[name] == array).all() and found[name].dtype == array.dtype for name, array in arrays().items())


def place(folder):
    (found,) = (path for path in folder.iterdir() if path.is_dir())
    return found


@pytest.fixture
def kept(tmp_path):
    """The folder of one cache that is whole."""
    cached_arrays(tmp_path, "index", FACTS, arrays)
    return place(tmp_path)


def test_what_is_built_is_kept(tmp_path):
    folder = tmp_path / "new" / "cache"
    assert same(cached_arrays(folder, "index", FACTS, arrays))
    found = cached_arrays(folder, "index", dict(reversed(FACTS.items())), never)
    assert same(found)
    assert not found["small"].flags.writeable
    assert sorted(path.name for path in place(folder).iterdir()) == ["index.json", "small.npy", "wide.npy"]
    assert json.loads((place(folder) / "index.json").read_text())["facts"] == FACTS


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert same(cached_arrays(None, "index", FACTS, arrays))
    assert list(tmp_path.iterdir()) == []


def test_other_facts_and_names_are_other_caches(kept):
    for name, facts in (("index", FACTS | {"seed": 2}), ("index", {"seed": 1}), ("other", FACTS)):
        with pytest.raises(AssertionError, match="was built"):
            cached_arrays(kept.parent, name, facts, never)


def test_a_damaged_cache_is_built_anew(kept):
    draw = random.Random(0)
    whole = {path.name: path.read_bytes() for path in kept.iterdir()}
    for damage in range(120):
        name = draw.choice(sorted(whole))
        data = bytearray(whole[name])
        if damage % 4 == 0:
            data = data[: draw.randrange(len(data))]
        elif damage % 4 == 1:
            data += draw.randbytes(9)
        else:
            for _ in range(damage % 4):
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        (kept / name).write_bytes(data)
        assert same(cached_arrays(kept.parent, "index", FACTS, arrays))
        assert same(cached_arrays(kept.parent, "index", FACTS, arrays))
    assert sorted(path.suffix for path in kept.parent.iterdir()) == ["", ".lock"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda kept: (kept / "small.npy").unlink(),
        lambda kept: (kept / "index.json").unlink(),
        lambda kept: (kept / "index.json").write_text("[]"),
        lambda kept: np.save(kept / "small.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True),
        lambda kept: np.save(kept / "small.npy", np.arange(100, dtype=np.int64)),
        lambda kept: np.save(kept / "small.npy", np.arange(100, dtype=np.uint32)[::-1]),
        shutil.rmtree,
    ],
)
def test_a_cache_of_something_else_is_built_anew(kept, damage):
    damage(kept)
    assert same(cached_arrays(kept.parent, "index", FACTS, arrays))
    assert same(cached_arrays(kept.parent, "index", FACTS, never))


def test_a_cache_under_the_name_of_another_is_built_anew(kept):
    cached_arrays(kept.parent, "index", FACTS | {"seed": 2}, arrays)
    (other,) = (path for path in kept.parent.iterdir() if path.is_dir() and path != kept)
    shutil.rmtree(other)
    kept.rename(other)
    with pytest.raises(AssertionError, match="was built"):
        cached_arrays(other.parent, "index", FACTS | {"seed": 2}, never)


def test_damage_is_looked_for_all_over_a_large_array(kept, monkeypatch):
    monkeypatch.setattr(index_cache, "_HASHED_IN_FULL", 64)
    monkeypatch.setattr(index_cache, "_HASHED_BLOCKS", 4)
    cached_arrays(kept.parent, "large", FACTS, arrays)
    path = next(kept.parent.glob("large-*/small.npy"))
    whole = path.read_bytes()
    for at in (len(whole) - 400, len(whole) - 270, len(whole) - 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(AssertionError, match="was built"):
            cached_arrays(kept.parent, "large", FACTS, never)


def build_slowly(folder):
    with (folder.parent / "built").open("a") as log:
        log.write("x")
    time.sleep(0.2)
    return arrays()


def ask(folder, start):
    start.wait()
    assert same(cached_arrays(folder, "index", FACTS, lambda: build_slowly(folder)))


def test_of_many_that_ask_at_once_one_builds(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    start = spawn.Barrier(4)
    ranks = [spawn.Process(target=ask, args=(tmp_path / "cache", start)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0] * 4
    assert (tmp_path / "built").read_text() == "x"


def die_while_writing(folder):
    index_cache.publish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    cached_arrays(folder, "index", FACTS, arrays)


def test_what_a_dead_builder_left_hinders_nobody(tmp_path):
    rank = multiprocessing.get_context("spawn").Process(target=die_while_writing, args=(tmp_path,))
    rank.start()
    rank.join(60)
    assert rank.exitcode == -signal.SIGKILL
    assert [path.suffix for path in tmp_path.iterdir() if path.is_dir()] == [".tmp"]
    assert same(cached_arrays(tmp_path, "index", FACTS, arrays))
    assert [path.suffix for path in tmp_path.iterdir() if path.is_dir()] == [""]


def test_without_locks_the_first_to_finish_stays(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError("no locks available")

    def publish_second(partial, final):
        shutil.copytree(partial, final)
        publish(partial, final)

    publish = index_cache.publish
    monkeypatch.setattr(index_cache.fcntl, "flock", no_locks)
    monkeypatch.setattr(index_cache, "publish", publish_second)
    foreign = tmp_path / "index-of-another.tmp"
    foreign.mkdir()
    assert same(cached_arrays(tmp_path, "index", FACTS, arrays))
    assert same(cached_arrays(tmp_path, "index", FACTS, never))
    assert foreign.is_dir()


def test_nothing_stands_under_its_name_before_it_is_whole(tmp_path, monkeypatch):
    def power_cut(partial, final):
        assert partial.suffix == ".tmp"
        assert not final.exists()
        raise OSError("power cut")

    monkeypatch.setattr(index_cache, "publish", power_cut)
    with pytest.raises(UserError, match="cannot be written: .*power cut|OSError"):
        cached_arrays(tmp_path, "index", FACTS, arrays)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/cache: cannot be written: .*; set data\.index_cache to a folder"):
        cached_arrays(tmp_path / "file" / "cache", "index", FACTS, arrays)


def test_what_is_kept_is_read_where_nothing_can_be_written(kept, monkeypatch):
    monkeypatch.setattr(index_cache, "_turn", never)
    assert same(cached_arrays(kept.parent, "index", FACTS, never))
