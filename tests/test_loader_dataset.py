"""Under code that is not ours: `VolumeDataset` in torch's DataLoader, and a loader in Lightning's Trainer."""

from __future__ import annotations

import logging
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from small_store import SHAPE, make_store
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Subset

from ingest.shard import shard_path
from ingest.store import open_store, write_phenotypes
from loaders import Augmentation, Batch, CorruptShardError, Loader, VolumeDataset, VolumeReader, open_loader
from loaders.fetch import ShardFetcher
from loaders.views import each

SCANS = 13
BAD = (4,)
OK = [row for row in range(SCANS) if row not in BAD]


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("dataset") / "s.zarr"
    make_store(path, SCANS, bad=BAD)
    age = np.where(np.arange(SCANS) == 2, np.nan, 50.0 + np.arange(SCANS))
    write_phenotypes(path, pd.DataFrame({"age": age}), {})
    return path


@pytest.fixture(scope="module")
def voxels(tmp_path_factory) -> np.ndarray:
    return make_store(tmp_path_factory.mktemp("same") / "s.zarr", SCANS, bad=BAD)


# ------------------------------------------------------------------------------------------------------ VolumeDataset


def test_items_are_the_scans_of_the_store(path, voxels):
    dataset = VolumeDataset(path)
    assert len(dataset) == len(OK)
    assert dataset.rows.tolist() == OK
    for item, row in enumerate(OK):
        sample = dataset[item]
        assert (sample.row, sample.participant) == (row, f"p{row}")
        assert (type(sample.row), type(sample.participant)) == (int, str)
        assert sample.image.dtype == torch.uint8
        np.testing.assert_array_equal(sample.image.numpy(), voxels[row])
    assert [sample.row for sample in dataset] == OK  # ends by an IndexError


def test_items_are_chosen_as_the_rows_of_a_loader(path):
    assert VolumeDataset(open_store(path), rows=[9, 2, 2]).rows.tolist() == [9, 2, 2]
    assert VolumeDataset(path, where="age >= 59").rows.tolist() == [9, 10, 11, 12]
    assert 2 not in VolumeDataset(path, known=["age"]).rows
    assert VolumeDataset(path, known="age").rows.tolist() == VolumeDataset(path, known=["age"]).rows.tolist()
    with pytest.raises(IndexError, match="row 4 holds no volume"):
        VolumeDataset(path, rows=[4])
    with pytest.raises(ValueError, match="the store has no phenotype 'iq'"):
        VolumeDataset(path, known=["iq"])
    with pytest.raises(FileNotFoundError, match="no store at"):
        VolumeDataset(path.with_name("none.zarr"))


def test_items_count_from_the_end_and_end_there(path):
    dataset = VolumeDataset(path)
    assert dataset[-1].row == OK[-1]
    assert dataset[-len(OK)].row == OK[0]
    assert dataset[np.int64(1)].row == dataset[torch.tensor(1)].row == OK[1]
    for item in (len(OK), -len(OK) - 1):
        with pytest.raises(IndexError, match=rf"items \[{item}\] were asked for, the dataset has {len(OK)}"):
            dataset[item]
    for wrong in (0.5, slice(0, 2), "1"):
        with pytest.raises(TypeError, match="cannot be interpreted as an integer"):
            dataset[wrong]
    with pytest.raises(IndexError, match="the dataset has 0"):
        VolumeDataset(path, rows=[])[0]


def test_a_batch_is_fetched_at_once(path, voxels):
    dataset = VolumeDataset(path)
    samples = dataset.__getitems__([3, -1, 3, 0])
    assert [sample.row for sample in samples] == [OK[3], OK[-1], OK[3], OK[0]]
    for sample in samples:
        np.testing.assert_array_equal(sample.image.numpy(), voxels[sample.row])
    assert dataset.__getitems__([]) == []
    with pytest.raises(IndexError, match=r"items \[0, 12\] were asked for"):
        dataset.__getitems__([0, 12])
    kept = dataset[0].image
    for item in range(len(dataset)):
        dataset[item]
    np.testing.assert_array_equal(kept.numpy(), voxels[0])  # not overwritten by what was read later


@pytest.mark.parametrize(
    "options", [{"view": "axial", "slices": [9, 6]}, {"view": "coronal", "slices": 2}, {}, {"view": "triplanar"}]
)
@pytest.mark.parametrize("more", [{}, {"dtype": "float32", "mean": 0.3, "std": 0.2}, {"channels": 3}])
def test_pictures_are_those_of_a_loader(path, options, more):
    dataset = VolumeDataset(path, **options, **more)
    with open_loader(path, batch_size=len(OK), backend="torch", **options, **more) as loader:
        (batch,) = loader
    for item in range(len(OK)):
        for one, images in zip(each(dataset[item].image), each(batch.images), strict=True):
            assert torch.equal(one, images[item])


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")  # where there is one core
@pytest.mark.parametrize("workers", [0, 2])
def test_torchs_loader_shuffles_and_collates(path, voxels, workers):
    dataset = VolumeDataset(path)
    dataset[0]  # the workers are forked from a process that has read
    loader = DataLoader(
        dataset, batch_size=5, shuffle=True, num_workers=workers, generator=torch.Generator().manual_seed(1),
        multiprocessing_context="fork" if workers else None,
    )  # fmt: skip
    orders = []
    for _ in range(2):
        batches = list(loader)
        assert [tuple(batch.image.shape) for batch in batches] == [(5, *SHAPE), (5, *SHAPE), (2, *SHAPE)]
        for batch in batches:
            assert batch.row.dtype == torch.int64
            assert list(batch.participant) == [f"p{row}" for row in batch.row.tolist()]
            np.testing.assert_array_equal(batch.image.numpy(), voxels[batch.row.numpy()])
        orders.append([row for batch in batches for row in batch.row.tolist()])
    assert sorted(orders[0]) == sorted(orders[1]) == OK
    assert orders[0] != orders[1]


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")
def test_torchs_loader_augments_by_seed_epoch_and_item_alone(path):
    dataset = VolumeDataset(path, dtype="float32", augmentation=Augmentation(noise=0.1), seed=3)
    expected = [dataset[item].image for item in range(len(dataset))]
    dataset.epoch = 1
    following = [dataset[item].image for item in range(len(dataset))]
    assert not any(torch.equal(a, b) for a, b in zip(expected, following, strict=True))
    for epoch, images in [(0, expected), (1, following)]:
        dataset.epoch = epoch
        sampler = BatchSampler(RandomSampler(dataset, generator=torch.Generator().manual_seed(0)), 4, drop_last=False)
        for batch in DataLoader(dataset, batch_sampler=sampler, num_workers=2, multiprocessing_context="fork"):
            for row, image in zip(batch.row.tolist(), batch.image, strict=True):
                assert torch.equal(image, images[OK.index(row)])
    other = VolumeDataset(path, dtype="float32", augmentation=Augmentation(noise=0.1), seed=4)
    assert not torch.equal(other[0].image, expected[0])


def test_a_dataset_may_be_wrapped_and_pickled(path, voxels):
    dataset = VolumeDataset(path, dtype="float32", augmentation=Augmentation())
    dataset.epoch = 2
    copy = pickle.loads(pickle.dumps(dataset))
    assert len(copy) == len(dataset)
    assert torch.equal(copy[5].image, dataset[5].image)
    assert len(pickle.dumps(dataset)) < 100_000  # no memory of the reader travels
    part = Subset(VolumeDataset(path), [7, 3])
    (batch,) = DataLoader(part, batch_size=2)
    np.testing.assert_array_equal(batch.image.numpy(), voxels[[OK[7], OK[3]]])


def test_a_forked_process_reads_into_memory_of_its_own(path):
    dataset = VolumeDataset(path)
    reader = dataset._open_reader()
    assert dataset._open_reader() is reader
    child = os.fork()
    if not child:
        os._exit(0 if dataset._open_reader() is not reader and dataset[0].row == OK[0] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_threads_may_share_a_dataset_or_a_reader(tmp_path):
    voxels = make_store(tmp_path / "s.zarr", 12)
    dataset, reader = VolumeDataset(tmp_path / "s.zarr"), VolumeReader(tmp_path / "s.zarr")
    barrier, fetch = threading.Barrier(2), ShardFetcher.fetch

    def fetch_together(*arguments: Any) -> Any:
        found = fetch(*arguments)
        barrier.wait(timeout=30)  # both have read before either decodes
        return found

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setattr(ShardFetcher, "fetch", fetch_together)
        for read in (lambda row: dataset[row].image, lambda row: reader.read([row])[0]):
            for row, image in enumerate(pool.map(read, range(12))):
                np.testing.assert_array_equal(image, voxels[row])


def test_a_relative_path_holds_when_the_program_changes_its_folder(tmp_path, monkeypatch):
    voxels = make_store(tmp_path / "s.zarr", 2)
    monkeypatch.chdir(tmp_path)
    dataset, reader = VolumeDataset("s.zarr"), VolumeReader("s.zarr")
    with open_loader("s.zarr", backend="torch", device="cpu", threads=1) as loader:
        monkeypatch.chdir("/")
        (batch,) = loader
    for images in (batch.images, [one.image for one in pickle.loads(pickle.dumps(dataset))], reader.read([0, 1])):
        np.testing.assert_array_equal(np.stack(list(images)), voxels)
    shard_path(tmp_path / "s.zarr", 1).unlink()
    with pytest.raises(CorruptShardError, match=r"row 1 \(1.nii.gz\) of s.zarr cannot be read"):
        reader.read([1])


def test_an_item_that_cannot_be_read_is_named(tmp_path):
    make_store(tmp_path / "s.zarr", 3)
    shard_path(tmp_path / "s.zarr", 1).write_bytes(b"no shard")
    dataset = VolumeDataset(tmp_path / "s.zarr")
    assert dataset[0].row == 0
    with pytest.raises(CorruptShardError, match=r"row 1 \(1.nii.gz\)"):
        dataset[1]


# ---------------------------------------------------------------------------------------------------------- Lightning

lightning_test = pytest.mark.filterwarnings(
    "ignore:.*isinstance.treespec, LeafSpec.* is deprecated:FutureWarning",  # by torch, used by Lightning 2.6
    "ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint need to be provided",
)


class Net(lightning.LightningModule):
    """Takes slices; notes the rows of each epoch in training, and what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(SHAPE[1] * SHAPE[2], 1)
        self.rows: dict[int, list[int]] = {}
        self.images: list[torch.Tensor] = []

    def training_step(self, batch: Batch, _: int) -> torch.Tensor:
        self.rows.setdefault(self.current_epoch, []).extend(batch.rows[batch.valid].tolist())
        self.images.append(batch.images.clone())
        return self.linear(batch.images.flatten(1)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-3)


class ValidatedNet(Net):
    """Has a validation loop within each epoch."""

    def validation_step(self, batch: Batch, _: int) -> None:
        self.linear(batch.images.flatten(1))


@pytest.fixture(autouse=True)
def quiet(monkeypatch) -> None:
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "level", logging.ERROR)


def slices(path: Path, **options) -> Loader:
    chosen = {"batch_size": 5, "shuffle": True, "seed": 1, "threads": 1, **options}
    return open_loader(path, view="axial", slices=[8], dtype="float32", backend="torch", **chosen)


def trainer(folder: Path, **options) -> lightning.Trainer:
    chosen = {"enable_checkpointing": False, **options}
    return lightning.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, **chosen,
    )  # fmt: skip


def orders_of(path: Path, epochs: int, **options) -> dict[int, list[int]]:
    """Return the rows of the first epochs, as a plain loop gets them."""
    with slices(path, **options) as loader:
        return {epoch: [row for batch in loader for row in batch.rows.tolist()] for epoch in range(epochs)}


def checkpoints(path: Path, folder: Path, *, drop_last: bool, validation: bool, **options) -> list[Path]:
    """Train for two epochs; return the checkpoints in their order, all in a folder of this name."""
    keeper = ModelCheckpoint(dirpath=folder, save_top_k=-1, filename="{step:02d}", **options)
    with slices(path, drop_last=drop_last) as loader, slices(path, shuffle=False) as others:
        trainer(folder, max_epochs=2, enable_checkpointing=True, callbacks=[keeper]).fit(
            *((ValidatedNet(), loader, others) if validation else (Net(), loader))
        )
    return sorted(folder.glob("*.ckpt"))


def resumed(path: Path, checkpoint: Path, *, drop_last: bool, validation: bool, **options) -> dict[int, list[int]]:
    """Go on from a checkpoint, with new loaders, to the end of the third epoch; return the rows of each epoch."""
    net = ValidatedNet() if validation else Net()
    with slices(path, drop_last=drop_last, **options) as loader, slices(path, shuffle=False) as others:
        trainer(checkpoint.parent, max_epochs=3).fit(
            net, loader, others if validation else None, ckpt_path=checkpoint, weights_only=True
        )
    return net.rows


@lightning_test
def test_lightning_trains_on_every_scan_in_another_order_each_epoch(path, voxels, tmp_path):
    net = Net()
    with slices(path) as loader:
        trainer(tmp_path, max_epochs=2).fit(net, loader)
        assert (loader.epoch, loader.state_dict()["position"]) == (2, 0)
    assert net.rows == orders_of(path, 2)
    assert sorted(net.rows[0]) == sorted(net.rows[1]) == OK
    assert net.rows[0] != net.rows[1]
    assert [len(images) for images in net.images] == [5, 5, 2] * 2
    seen = torch.cat(net.images).squeeze(1).numpy()
    np.testing.assert_allclose(seen, voxels[net.rows[0] + net.rows[1], 8, ::-1] / np.float32(255), rtol=1e-6)


@lightning_test
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning_takes_batches_as_they_are(path, tmp_path, precision):
    net = ValidatedNet()
    with slices(path) as loader, slices(path, shuffle=False) as others:
        trainer(tmp_path, max_epochs=1, precision=precision).fit(net, loader, others)
    assert sorted(net.rows[0]) == OK


@lightning_test
@pytest.mark.parametrize("validation", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
def test_lightning_goes_on_within_an_epoch_exactly(path, tmp_path, drop_last, validation):
    """It saves a loader's state and loads it. It asks for no batch ahead, for it knows how many there are."""
    how = {"drop_last": drop_last, "validation": validation}
    found = checkpoints(path, tmp_path, **how, every_n_train_steps=1)
    per_epoch = 2 if drop_last else 3
    assert len(found) == 2 * per_epoch
    expected = orders_of(path, 3, drop_last=drop_last)
    for step, checkpoint in enumerate(found, start=1):
        epoch, batches = divmod(step, per_epoch)  # after the last batch of an epoch, the next one is due
        content = torch.load(checkpoint, weights_only=True)
        (state,) = content["loops"]["fit_loop"]["state_dict"]["combined_loader"]
        assert (state["epoch"], state["position"]) == (epoch, 5 * batches)
        left = {epoch: expected[epoch][5 * batches :], **{later: expected[later] for later in range(epoch + 1, 3)}}
        assert resumed(path, checkpoint, **how) == left


@lightning_test
def test_lightning_goes_on_with_smaller_batches(path, tmp_path):
    """Not with larger ones, or more ranks: it counts batches, and takes the epoch for done before all scans are."""
    how = {"drop_last": False, "validation": False}
    checkpoint = checkpoints(path, tmp_path, **how, every_n_train_steps=1)[0]
    expected = orders_of(path, 3)
    expected[0] = expected[0][5:]
    assert resumed(path, checkpoint, **how, batch_size=2) == expected


@lightning_test
@pytest.mark.parametrize("validation", [False, True])
def test_lightning_goes_on_with_the_next_epoch(path, tmp_path, validation):
    """It tells the sampler of a loader, if that has any, which epoch begins."""
    how = {"drop_last": False, "validation": validation}
    found = checkpoints(path, tmp_path, **how)  # Lightning's default: at the end of each epoch
    assert len(found) == 2
    expected = orders_of(path, 3)
    for epoch, checkpoint in enumerate(found, start=1):
        assert resumed(path, checkpoint, **how) == {later: expected[later] for later in range(epoch, 3)}
