"""A checkpoint counts when it is whole; a damaged one is named, and the one before it is taken."""

from __future__ import annotations

import json
import shutil
import sys

import forks
import pytest
import small_disk
import torch
import torch.distributed as dist

from dsplugins.checkpoint import store
from dsplugins.checkpoint.manifest import MANIFEST
from dsplugins.checkpoint.pieces import Piece
from dsplugins.contracts import RecipeError


@pytest.fixture
def group(single):
    return dist.group.WORLD


def piece(value):
    return Piece("weights/x", (4, 3), (0, 0), torch.full((4, 3), float(value)), True)


def save(folder, step, group):
    return store.save(folder, step, [piece(step)], {"progress": {"steps": step}}, group)


def value_of(checkpoint, group):
    found = piece(-1)
    store.load(checkpoint, [found], group)
    return found.data.unique().item()


def test_the_newest_is_found_and_read(tmp_path, group):
    for step in (2, 10, 4):
        save(tmp_path, step, group)
    assert [c.step for c in store.finished(tmp_path)] == [10, 4, 2]
    found, damaged = store.newest_good(tmp_path, group)
    assert found.step == 10 and not damaged and value_of(found, group) == 10
    manifest = found.manifest()
    assert manifest["step"] == 10 and set(manifest["files"]) == {"__0_0.distcp", ".metadata"}


def doctored(change):
    """A manifest that says something else, in JSON."""

    def harm(file):
        said = json.loads(file.read_text())
        file.write_text(json.dumps(change(said) or said))

    return harm


MANIFESTS = {
    "no manifest": (lambda file: file.unlink(), "No such file"),
    "half a manifest": (lambda file: file.write_text(file.read_text()[:40]), "is not JSON"),
    "no object": (doctored(lambda said: [said]), "other content"),
    "no files": (doctored(lambda said: said["files"].clear()), "other content"),
    "another place": (doctored(lambda said: said["progress"].update(steps=1)), "other content"),
    "no digest": (doctored(lambda said: said.pop("sha256") and None), "other content"),
}


@pytest.mark.parametrize("harm", MANIFESTS)
def test_a_damaged_manifest_is_named_and_the_one_before_taken(tmp_path, group, harm):
    save(tmp_path, 1, group)
    bad = save(tmp_path, 2, group).path
    spoil, said = MANIFESTS[harm]
    spoil(bad / MANIFEST)
    found, damaged = store.newest_good(tmp_path, group)
    assert found.step == 1
    assert len(damaged) == 1 and f"{bad.name} is damaged (manifest.json: {said}" in damaged[0]


def test_one_under_another_steps_name_does_not_count(tmp_path, group):
    save(tmp_path, 2, group).path.rename(tmp_path / "step-00000004")
    found, damaged = store.newest_good(tmp_path, group)
    assert found is None and "step-00000004 is damaged (manifest.json: is of step 2)" in damaged[0]


@pytest.mark.parametrize("harm", ["cut", "flip", "lose"])
def test_a_damaged_one_is_named_and_the_one_before_taken(tmp_path, group, harm):
    save(tmp_path, 1, group)
    bad = save(tmp_path, 2, group).path
    data = bad / "__0_0.distcp"
    content = data.read_bytes()
    if harm == "cut":
        data.write_bytes(content[:-1])
    elif harm == "flip":
        data.write_bytes(content[:500] + bytes([content[500] ^ 1]) + content[501:])
    else:
        data.unlink()
    found, damaged = store.newest_good(tmp_path, group)
    assert found.step == 1
    assert len(damaged) == 1 and bad.name in damaged[0] and data.name in damaged[0]


def test_what_was_being_written_does_not_count_and_is_cleared(tmp_path, group):
    save(tmp_path, 1, group)
    half = tmp_path / "step-00000002.partial"
    half.mkdir()
    (half / MANIFEST).write_text(json.dumps({"files": {}}))
    assert store.newest_good(tmp_path, group)[0].step == 1
    file = tmp_path / "step-00000003.partial"
    file.write_text("in the way")
    store.clear_partial(tmp_path)
    assert not half.exists() and not file.exists()


def test_all_are_removed_and_nothing_else_where_the_folder_is_a_link(tmp_path, group):
    there, here = tmp_path / "scratch", tmp_path / "checkpoints"
    there.mkdir()
    here.symlink_to(there)
    (there / "others").write_text("")
    save(here, 1, group)
    (here / "step-00000002.damaged").mkdir()
    store.clear(here)
    assert [entry.name for entry in here.iterdir()] == ["others"]


def test_the_last_k_and_every_nth_are_kept(tmp_path, group):
    for step in range(1, 8):
        save(tmp_path, step, group)
    store.prune(tmp_path, keep=2, keep_every=3)
    assert [c.step for c in store.finished(tmp_path)] == [7, 6, 3]


def test_what_is_missing_is_named(tmp_path, group):
    checkpoint = save(tmp_path, 1, group)
    other = Piece("weights/y", (4, 3), (0, 0), torch.zeros(4, 3), True)
    with pytest.raises(RecipeError, match="step-00000001 doesn't fit this run: weights/y is not in it"):
        store.load(checkpoint, [other], group)


def test_what_no_rank_asks_for_is_told(tmp_path, group):
    more = Piece("weights/y", (2,), (0,), torch.zeros(2), True)
    checkpoint = store.save(tmp_path, 1, [piece(1), more], {}, group)
    assert store.load(checkpoint, [piece(0), more], group) == []
    assert store.load(checkpoint, [piece(0)], group) == ["weights/y"]


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path, group):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OSError, match="rank 0: Not a directory"):
        save(blocked / "checkpoints", 1, group)


def test_a_finished_one_is_never_replaced(tmp_path, group):
    """Not before another one is written, and not by one that was written meanwhile."""
    first = save(tmp_path, 1, group)
    with pytest.raises(OSError, match="rank 0: there already, .*step-00000001$"):
        store.save(tmp_path, 1, [piece(7)], {}, group)
    assert not list(tmp_path.glob("*.partial")) and value_of(first, group) == 1
    other = tmp_path / "elsewhere"
    shutil.copytree(first.path, other)
    with pytest.raises(OSError, match="not empty"):
        store._commit(other, first.path, 1, {}, {})
    assert store.newest_good(tmp_path, group) == (first, []) and value_of(first, group) == 1


def test_damaged_ones_are_set_aside_and_push_no_good_one_out(tmp_path, group):
    for step in (900, 1000):
        save(tmp_path, step, group)
    (tmp_path / "step-00001000" / "__0_0.distcp").unlink()
    found, _ = store.newest_good(tmp_path, group)
    store.set_aside(tmp_path, found.step)
    save(tmp_path, 950, group)
    assert [c.step for c in store.prune(tmp_path, keep=1, keep_every=0)] == [900]
    assert [c.step for c in store.finished(tmp_path)] == [950]
    assert (tmp_path / "step-00001000.damaged").is_dir()


def test_whatever_goes_wrong_on_a_rank_is_heard_by_all(tmp_path, group):
    with pytest.raises(RuntimeError, match="rank 0: TypeError: .*not JSON serializable"):
        store.save(tmp_path, 1, [piece(1)], {"facts": object()}, group)


def test_a_box_that_a_rank_holds_twice_is_refused(tmp_path, group):
    with pytest.raises(Exception, match="twice"):
        store.save(tmp_path, 1, [piece(1), piece(1)], {}, group)


FULL = """
from pathlib import Path
import small_disk
import torch
import torch.distributed as dist
from dsplugins.checkpoint import store
from dsplugins.checkpoint.pieces import Piece

folder = Path("kept")
folder.mkdir()
small_disk.alone()
small_disk.mount(folder, "12m")
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def save(step):
    size, data = (1000, 400), torch.full((1000, 400), float(step))
    pieces = [Piece(f"weights/{i}", size, (0, 0), data, True) for i in range(5)]
    try:
        store.save(folder, step, pieces, {}, dist.group.WORLD)
        said = "saved"
    except OSError as error:
        said = str(error)
    print(step, said, sorted(each.name for each in folder.iterdir()), flush=True)


save(3)
save(6)
small_disk.mount(folder, "17m", again=True)
save(9)
"""


@small_disk.needed
def test_a_disk_that_is_full_of_large_tensors_is_called_so_and_room_is_given_back(tmp_path):
    """torch's writer only says that it wrote less than it meant to."""
    (tmp_path / "full.py").write_text(FULL)
    process = forks.Fork([sys.executable, "full.py"], tmp_path, small_disk.ENVIRONMENT)
    said, _ = process.communicate(timeout=60)
    first, second, third = said.splitlines()
    assert first == "3 saved ['step-00000003']"
    assert second.startswith("6 step-00000006 can't be written: rank 0: No space left on device for ")
    assert second.endswith(" bytes of 8000000 ['step-00000003']")
    assert third == "9 saved ['step-00000003', 'step-00000009']"
