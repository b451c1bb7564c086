"""The plan of steps: the same scans in each, however many processes and micro-batches share them."""

from __future__ import annotations

import numpy as np
import pytest
from finetuning import tiny_settings
from hypothesis import given
from hypothesis import strategies as st

from finetune.settings import FinetuneSettings
from finetune.steps import plan_steps
from loaders.order import Sampling


@given(
    scans=st.integers(1, 60),
    share=st.integers(1, 24),
    processes=st.integers(1, 4),
    micro=st.none() | st.integers(1, 12),
    most=st.integers(1, 12),
    min_steps=st.integers(0, 20),
)
def test_steps_see_the_same_scans_however_many_processes_share_them(scans, share, processes, micro, most, min_steps):
    batch = share * processes
    settings = tiny_settings(batch_size=batch, micro_batch=min(micro, batch) if micro else None, min_steps=min_steps)
    steps = plan_steps(scans, settings, most, processes)
    alone = plan_steps(scans, settings, most)
    assert (steps.batch, steps.per_epoch, steps.epochs) == (alone.batch, alone.per_epoch, alone.epochs)
    assert steps.batch == min(batch, scans)
    assert steps.micro <= (min(micro, batch) if micro else most)
    assert steps.total >= max(min_steps, steps.per_epoch * settings.epochs)
    assert steps.epochs == settings.epochs or (steps.epochs - 1) * steps.per_epoch < min_steps
    rows = np.arange(100, 100 + scans)
    ranks = [Sampling(rows, batch_size=steps.micro, rank=rank, world_size=processes) for rank in range(processes)]
    batches = [list(rank.batches(0)) for rank in ranks]
    for number in range(steps.per_epoch):
        seen = [
            plan.rows[plan.valid]
            for of_rank in batches
            for plan in of_rank[number * steps.accumulate : (number + 1) * steps.accumulate]
        ]
        assert sorted(np.concatenate(seen)) == rows[number * steps.batch : (number + 1) * steps.batch].tolist()
    assert {len(of_rank[: steps.per_epoch * steps.accumulate]) for of_rank in batches} == {
        steps.per_epoch * steps.accumulate
    }


@pytest.mark.parametrize(
    ("batch", "processes", "advised"),
    [(13, 1, 16), (26, 1, 24), (26, 2, 32), (16, 1, None), (14, 1, None), (5, 1, None)],
)
def test_a_batch_that_does_not_divide_is_warned_of(batch, processes, advised):
    steps = plan_steps(1000, FinetuneSettings(batch_size=batch), 8, processes)
    if advised is None:
        assert steps.warning is None
    else:
        assert f"are taken {steps.micro} at a time, though 8 would fit" in steps.warning
        assert steps.warning.endswith(f"--batch-size {advised} would be faster")
        assert plan_steps(1000, FinetuneSettings(batch_size=advised), 8, processes).warning is None


def test_few_scans_are_taken_many_at_a_time():
    """Batch norms want more than one: a number of scans without divisors must not be taken one by one."""
    steps = plan_steps(17, FinetuneSettings(batch_size=32), most=8)
    assert (steps.batch, steps.micro, steps.accumulate, steps.per_epoch) == (17, 6, 3, 1)


def test_processes_that_cannot_share_a_batch_are_told():
    with pytest.raises(
        ValueError, match="batch_size is 8, which 3 processes cannot share evenly; expected a multiple of 3"
    ):
        plan_steps(100, tiny_settings(batch_size=8), 8, 3)
