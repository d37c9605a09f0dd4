"""`TableCache`: entries are found whole or not at all, whoever dies, meddles, or comes at the same time."""

from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.rllib.core.columns import Columns
from test_offline_table import ACTION_DIM, GAMMA, assert_holds, episodes_of

from rllib_calql.datasets.episodes.files import DataFile, fingerprint_of
from rllib_calql.store.offline_table import OfflineTableBuilder
from rllib_calql.store.table_cache import TableCache, cache_key, default_cache_dir, default_memory_limit

LIMIT = 2**30
COLUMNS = episodes_of([5, 1, 3])


def build(cache: TableCache, key: str | None, seed: int = 0, **stored_with: Any) -> Any:
    builder = OfflineTableBuilder(action_dim=ACTION_DIM)
    with cache.build(key) as writer:
        builder.move_to(writer)
        builder.add(episodes_of([5, 1, 3], seed=seed))
        assert builder.dtype is not None
        return writer.finish(
            dtype=builder.dtype,
            episodes=builder.episodes(),
            stored_with=stored_with,
            gamma=GAMMA,
            memory_limit=LIMIT,
        )


def load(cache: TableCache, key: str) -> Any:
    return cache.load(key, gamma=GAMMA, memory_limit=LIMIT)


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_an_entry_is_found_with_what_was_stored_with_it(tmp_path: Path) -> None:
    cache = TableCache(tmp_path / "new" / "folder")
    assert load(cache, "key") is None
    assert_holds(build(cache, "key", answer=[1, 2.5]), COLUMNS)
    table, stored = load(cache, "key")
    assert_holds(table, COLUMNS)
    assert stored == {"answer": [1, 2.5]}
    assert load(cache, "other") is None
    assert left_in(tmp_path / "new" / "folder") == ["key"]


def test_a_table_without_a_key_is_gone_with_its_last_map(tmp_path: Path) -> None:
    table = build(TableCache(tmp_path), None)
    assert left_in(tmp_path) == []
    assert_holds(table, COLUMNS)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["records.bin", "final_observations.bin", "episodes.npz", "meta.json"])
@pytest.mark.parametrize("damage", ["a flipped bit", "half of it", "an empty file", "no file"])
def test_a_damaged_entry_is_not_found_and_made_anew(tmp_path: Path, name: str, damage: str) -> None:
    cache = TableCache(tmp_path)
    build(cache, "key")
    path = tmp_path / "key" / name
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    if damage == "a flipped bit":
        _flip(path)
    elif damage == "half of it":
        os.truncate(path, path.stat().st_size // 2)
    elif damage == "an empty file":
        path.write_bytes(b"")
    else:
        path.unlink()
    if path.exists():
        os.utime(path, ns=times)  # File times tell nothing.
    assert load(cache, "key") is None
    build(cache, "key", seed=1)
    table, _ = load(cache, "key")
    assert_holds(table, episodes_of([5, 1, 3], seed=1))
    assert left_in(tmp_path) == ["key"]


def test_an_entry_of_another_version_is_made_anew_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = TableCache(tmp_path)
    build(cache, "key")
    meta = json.loads((tmp_path / "key" / "meta.json").read_text())
    (tmp_path / "key" / "meta.json").write_text(json.dumps(meta | {"version": 0}))
    with caplog.at_level(logging.WARNING):
        assert load(cache, "key") is None
    assert "are damaged and are made anew: version 0" in caplog.text


@pytest.mark.parametrize("content", ["[" * 100_000, "9" * 5000, "[]", "null", "NaN", '{"version": [1]}'])
def test_an_entry_whose_description_is_damaged_is_made_anew_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    cache = TableCache(tmp_path)
    build(cache, "key")
    (tmp_path / "key" / "meta.json").write_text(content)
    with caplog.at_level(logging.WARNING):
        assert load(cache, "key") is None
    assert "are damaged and are made anew" in caplog.text


def test_what_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    cache = TableCache(tmp_path)

    def fail() -> None:
        with cache.build("key") as writer:
            writer.write("records", np.zeros(10))
            raise RuntimeError("broken data")

    with pytest.raises(RuntimeError, match="broken data"):
        fail()
    assert left_in(tmp_path) == []
    assert load(cache, "key") is None


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_reported_with_the_remedy_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def full(fd: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("rllib_calql.store.table_cache.os.fsync", full)
    with pytest.raises(OSError, match=r"There is no room for the offline data in .*; set `cache_dir`") as caught:
        build(TableCache(tmp_path), "key")
    assert caught.value.errno == number
    assert left_in(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_reported_by_its_setting(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"`cache_dir` .* cannot be made"):
        build(TableCache(tmp_path / "file" / "cache"), "key")


def _build_slowly(folder: str, ready: Any, delay_s: float) -> None:
    cache = TableCache(Path(folder))
    with cache.lock("key"), cache.build("key") as writer:
        writer.write("records", np.zeros(1000))
        ready.set()
        time.sleep(delay_s)


def test_a_builder_that_is_killed_neither_blocks_others_nor_leaves_its_files(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=_build_slowly, args=(str(tmp_path), ready, 60.0))
    process.start()
    assert ready.wait(20)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(20)
    assert [name for name in left_in(tmp_path) if name.startswith(".building-")]
    cache = TableCache(tmp_path)
    with cache.lock("key"):
        build(cache, "key")
    assert left_in(tmp_path) == ["key"]
    assert_holds(load(cache, "key")[0], COLUMNS)


def test_a_second_builder_waits_for_the_first(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=_build_slowly, args=(str(tmp_path), ready, 1.0))
    process.start()
    assert ready.wait(20)
    begin = time.monotonic()
    with TableCache(tmp_path).lock("key"):
        assert time.monotonic() - begin > 0.3
    process.join(20)
    with TableCache(tmp_path).lock("another key"):  # Other entries do not wait.
        pass


def test_keys_depend_on_every_part_and_on_nothing_else() -> None:
    parts = [["fingerprint"], {"gamma": 0.99, "reward_scale": 1.0}]
    assert cache_key(parts) == cache_key(json.loads(json.dumps(parts)))
    changed = [["other"], parts[1]], [parts[0], {"gamma": 0.98, "reward_scale": 1.0}], [parts[0], {"gamma": 0.99}]
    assert len({cache_key(parts), *(cache_key(c) for c in changed)}) == 4


def test_the_cache_lies_in_the_users_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "rllib_calql"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "rllib_calql"


def test_the_default_limit_is_half_of_the_memory_or_of_the_control_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = tmp_path / "memory.max"
    monkeypatch.setattr("rllib_calql.store.table_cache._CGROUP_LIMITS", (tmp_path / "none", limit))
    assert default_memory_limit() == total // 2
    limit.write_text("max\n")
    assert default_memory_limit() == total // 2
    limit.write_text("1000000\n")
    assert default_memory_limit() == 500_000


def test_columns_of_a_loaded_entry_cannot_be_written(tmp_path: Path) -> None:
    table = build(TableCache(tmp_path), "key")
    with pytest.raises(ValueError, match="read-only"):
        table.records[Columns.REWARDS][0] = 1.0


def test_mapped_and_read_files_have_one_fingerprint(tmp_path: Path) -> None:
    files = []
    for name, size in (("a", 0), ("b", 5), ("c", 2**24), ("d", 2**24 + 1)):
        (tmp_path / name).write_bytes(np.random.default_rng(size).bytes(size))
        files.append(DataFile(str(tmp_path / name)))
    assert fingerprint_of(files, mapped=True) == fingerprint_of(files) != fingerprint_of(files[::-1])


def test_a_lock_that_is_a_link_or_another_file_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "key.lock").symlink_to(tmp_path / "victim")
    (tmp_path / "cache" / "other.lock").write_text("precious too")
    for key in ("key", "other"):
        with pytest.raises(FileExistsError, match="move it away"), TableCache(tmp_path / "cache").lock(key):
            pass
    assert (tmp_path / "victim").read_text() == "precious"
    assert (tmp_path / "cache" / "other.lock").read_text() == "precious too"
