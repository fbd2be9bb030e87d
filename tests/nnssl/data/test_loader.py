import multiprocessing
import os
import signal
import sys
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch

from nnssl.data.case_store import CaseProperties, CaseStore, write_case
from nnssl.data.loader import make_loader
from nnssl.data.patch_boxes import draw_box, draw_case
from nnssl.draws import make_generator
from nnssl.errors import UserError
from tests.waiting import HUNG_S, has_ended, receive, wait_until

SHAPES = {"large": (9, 31, 23), "small": (3, 8, 30), "long": (25, 12, 11), "flat": (6, 40, 40), "other": (11, 17, 19)}
PATCH = (5, 12, 10)
NO_FOREGROUND = np.zeros((0, 3), int)


@pytest.fixture
def store(tmp_path) -> CaseStore:
    """Five cases of two channels; the value of a voxel tells case, place and channel."""
    for number, (name, shape) in enumerate(SHAPES.items()):
        voxels = np.arange(np.prod(shape), dtype=np.float32).reshape(shape) % 1009 + 1
        volume = np.stack([voxels, -voxels - number])
        foreground = np.argwhere(voxels % 7 == 0)[:40]
        properties = CaseProperties(2, shape, 2, (2.0, 1.0, 1.0), (), "", 0.1, 1.0, None)
        write_case(tmp_path, name, volume, foreground, properties, PATCH, voxels % 5 < 3)
    return CaseStore(tmp_path)


def crop(store, name, lower, size) -> np.ndarray:
    whole = store.case(name).read_box((0, 0, 0), SHAPES[name])
    padded = np.pad(whole, [(0, 0)] + [(50, 50)] * 3)
    return padded[(slice(None), *[slice(low + 50, low + 50 + length) for low, length in zip(lower, size, strict=True)])]


def key(batch):
    return batch.step, batch.samples, batch.cases, batch.lower_vox.tolist(), batch.volumes.numpy().tobytes()


@pytest.mark.parametrize("patch", [PATCH, (12, 10)])
def test_patches_are_cut_where_the_batch_says(store, patch):
    batches = list(make_loader(store, patch, 3, 1, "m.s", 0, 12))
    assert [batch.step for batch in batches] == list(range(12))
    for batch in batches:
        assert batch.volumes.shape == (3, 2, *patch)
        assert batch.volumes.dtype == torch.float32
        assert batch.samples == [0, 1, 2]
        for volume, name, lower in zip(batch.volumes, batch.cases, batch.lower_vox.tolist(), strict=True):
            expected = crop(store, name, lower, (1, *patch)[-3:])
            np.testing.assert_array_equal(volume, expected.reshape(volume.shape))


@pytest.mark.parametrize("patch", [PATCH, (12, 10)])
def test_masks_are_cut_like_the_voxels_and_false_outside(store, patch):
    beyond = 0
    plain, masked = (list(make_loader(store, patch, 3, 1, "m.s", 0, 12, learnable=each)) for each in (False, True))
    for without, batch in zip(plain, masked, strict=True):
        assert without.learnable is None
        assert key(without) == key(batch)
        assert batch.learnable.dtype == torch.bool
        voxels = batch.volumes[:, 0]  # 0 outside the image only
        assert torch.equal(batch.learnable, (voxels % 5 < 3) & (voxels > 0))
        beyond += int((voxels == 0).sum())
    assert beyond > 0


@pytest.mark.parametrize("patch", [PATCH, (12, 10)])
def test_workers_change_nothing(store, patch):
    here = [key(batch) for batch in make_loader(store, patch, 4, 3, "m.s", 2, 9)]
    there = [key(batch) for batch in make_loader(store, patch, 4, 3, "m.s", 2, 9, num_workers=2)]
    assert here == there


def test_ranks_take_contiguous_parts_of_the_same_batch(store):
    whole = list(make_loader(store, PATCH, 4, 3, "m.s", 0, 6))
    parts = [list(make_loader(store, PATCH, 4, 3, "m.s", 0, 6, rank, 2)) for rank in range(2)]
    for batch, first, second in zip(whole, *parts, strict=True):
        assert (first.samples, second.samples) == ([0, 1], [2, 3])
        assert first.cases + second.cases == batch.cases
        assert torch.equal(torch.cat([first.volumes, second.volumes]), batch.volumes)
        assert torch.equal(torch.cat([first.lower_vox, second.lower_vox]), batch.lower_vox)


def test_a_restart_goes_on_alike(store):
    whole = [key(batch) for batch in make_loader(store, PATCH, 2, 3, "m.s", 0, 9)]
    assert [key(batch) for batch in make_loader(store, PATCH, 2, 3, "m.s", 5, 9)] == whole[5:]
    assert len(make_loader(store, PATCH, 2, 3, "m.s", 5, 9)) == 4


@pytest.mark.parametrize("change", [{"seed": 4}, {"stage": "m.t"}, {"first_step": 9, "last_step": 18}])
def test_seed_stage_and_step_change_the_samples(store, change):
    given = {"seed": 3, "stage": "m.s", "first_step": 0, "last_step": 9}
    batches = [list(make_loader(store, PATCH, 2, **settings)) for settings in (given, {**given, **change})]
    names = [[batch.cases for batch in entries] for entries in batches]
    places = [[batch.lower_vox.tolist() for batch in entries] for entries in batches]
    assert names[0] != names[1]
    assert places[0] != places[1]


def test_samples_of_a_batch_are_drawn_apart(store):
    batch = next(iter(make_loader(store, (2, 2, 2), 50, 3, "m.s", 0, 1)))
    assert len({(name, *lower) for name, lower in zip(batch.cases, batch.lower_vox.tolist(), strict=True)}) > 40


def test_boxes_of_one_case_differ_between_steps_places_stages_and_seeds(tmp_path):
    """With one case nothing but the box can differ."""
    volume = np.zeros((1, 40, 50, 60), np.float32)
    write_case(
        tmp_path,
        "a",
        volume,
        NO_FOREGROUND,
        CaseProperties(2, (40, 50, 60), 1, (1.0,) * 3, (), "", 0.0, 1.0, None),
        PATCH,
    )
    store = CaseStore(tmp_path)
    boxes = [
        tuple(lower)
        for seed, stage in ((3, "m.s"), (4, "m.s"), (3, "m.t"))
        for batch in make_loader(store, PATCH, 2, seed, stage, 0, 6)
        for lower in batch.lower_vox.tolist()
    ]
    assert len(set(boxes)) == len(boxes) == 36


@pytest.mark.parametrize("batch_size", [1, 3, 14])
def test_every_case_is_visited_once_in_each_pass(batch_size):
    cases, passes = 7, 6
    samples = [divmod(index, batch_size) for index in range(cases * passes)]
    drawn = [draw_case(cases, batch_size, 5, "m.s", step, sample) for step, sample in samples]
    orders = [tuple(drawn[start : start + cases]) for start in range(0, len(drawn), cases)]
    assert all(sorted(order) == list(range(cases)) for order in orders)
    assert len(set(orders)) == passes


def test_the_loader_visits_the_cases_evenly(store):
    visits = Counter(name for batch in make_loader(store, PATCH, 4, 0, "m.s", 0, 10) for name in batch.cases)
    assert visits == dict.fromkeys(SHAPES, 8)


def test_boxes_stay_inside_where_the_volume_is_larger_and_are_centred_where_it_is_smaller():
    shape, size = (9, 20, 4), (5, 20, 7)
    foreground = np.array([[0, 0, 0], [8, 19, 3], [4, 9, 1]])
    for number in range(300):
        lower = draw_box(shape, size, foreground, 0.5, make_generator(number))
        assert 0 <= lower[0] <= 4
        assert lower[1:] == (0, -1)


def test_boxes_reach_every_place():
    seen = {draw_box((6, 5, 4), (3, 2, 4), NO_FOREGROUND, 0.9, make_generator(number)) for number in range(400)}
    assert seen == {(z, y, 0) for z in range(4) for y in range(4)}


def test_boxes_contain_their_foreground_voxel_and_are_not_always_centred_on_it():
    shape, size, point = (60, 70, 50), (9, 16, 8), np.array([[30, 12, 48]])
    boxes = np.array([draw_box(shape, size, point, 1.0, make_generator(number)) for number in range(500)])
    assert np.all(boxes <= point)
    assert np.all(point < boxes + size)
    offsets = point - boxes - np.array(size) // 2
    assert set(offsets[:, 0].tolist()) == set(range(-2, 3))
    assert set(offsets[:, 1].tolist()) == set(range(-4, 5))
    assert boxes[:, 2].max() == 42  # against the far wall


def test_every_foreground_voxel_is_used():
    points = np.array([[5, 5, 5], [20, 5, 5], [35, 5, 5]])
    boxes = [draw_box((40, 11, 11), (1, 3, 3), points, 1.0, make_generator(number)) for number in range(100)]
    assert {box[0] for box in boxes} == {5, 20, 35}


@pytest.mark.parametrize("patch", [(6, 8, 7), (8, 7)])
def test_air_is_avoided(tmp_path, patch):
    body = np.zeros((40, 50, 45), bool)
    body[4:10, 30:42, 5:14] = True
    volume = np.where(body, 1.0, 0.0).astype(np.float32)[None]
    properties = CaseProperties(2, body.shape, 1, (1.0, 1.0, 1.0), (), "", float(body.mean()), 1.0, None)
    write_case(tmp_path, "a", volume, np.argwhere(body)[::5], properties, patch)
    store = CaseStore(tmp_path)
    shares = {}
    for share in (0.0, 0.9):
        batches = make_loader(store, patch, 50, 1, "m.s", 0, 8, foreground_share=share)
        shares[share] = np.mean([float(volume.sum()) > 0 for batch in batches for volume in batch.volumes])
    assert shares[0.0] < 0.25
    assert 0.88 < shares[0.9] < 0.96


def test_a_batch_that_cannot_be_shared_is_refused(store):
    with pytest.raises(UserError, match="batch_size must be divisible by 4, .* got 6; use 4"):
        make_loader(store, PATCH, 6, 0, "m.s", 0, 1, 0, 4)
    with pytest.raises(ValueError, match="2 or 3 axes"):
        make_loader(store, (4,), 2, 0, "m.s", 0, 1)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_global_random_state_is_left_alone(store, workers):
    torch.manual_seed(11)
    before = torch.get_rng_state()
    list(make_loader(store, PATCH, 2, 0, "m.s", 0, 2, num_workers=workers))
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_outlive_a_request_to_stop(store, monkeypatch):
    """A scheduler sends SIGTERM to every process of a job; the readers must stay until the trainer has saved."""
    monkeypatch.setattr("nnssl.data.loader.GRACE_SECONDS", HUNG_S)
    batches = iter(make_loader(store, PATCH, 4, 3, "m.s", 0, 40, num_workers=1))
    next(batches)
    workers = multiprocessing.active_children()
    assert workers
    for worker in workers:
        os.kill(worker.pid, signal.SIGTERM)
    assert len([batch.step for batch in batches]) == 39


def read_until_killed(folder: Path, parent: Connection) -> None:
    batches = iter(make_loader(CaseStore(folder), PATCH, 4, 3, "m.s", 0, 40, num_workers=2))
    next(batches)
    parent.send([reader.pid for reader in multiprocessing.active_children()])
    parent.recv()  # nothing is ever sent, so it waits to be killed


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")
def test_readers_end_with_a_training_that_was_killed(store):
    """Also where processes are started by a server, whose end readers would wait for in vain."""
    here, there = multiprocessing.Pipe()
    training = multiprocessing.get_context("spawn").Process(target=read_until_killed, args=(store.folder, there))
    training.start()
    readers = receive(here, training)
    assert len(readers) == 2
    assert not any(map(has_ended, readers))
    training.kill()
    training.join()
    wait_until(lambda: all(map(has_ended, readers)))
