"""Means are exact over ragged batches and processes; the device is read once; throughput follows its clock."""

import math
import re
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import multiprocessing

from pipeline.tracking.meters import (
    ActiveUnits,
    Meter,
    Throughput,
    bits_per_dimension,
    extremes,
    gpu_memory,
    host_memory,
)

finite = st.floats(-1e6, 1e6, width=32)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(finite, min_size=1, max_size=5), min_size=1, max_size=6))
def test_mean_over_ragged_batches(batches):
    meter = Meter()
    for batch in batches:
        meter.add("loss", torch.tensor(batch, dtype=torch.float64).sum(), len(batch))
    everything = [value for batch in batches for value in batch]
    assert meter.reduce() == {"loss": pytest.approx(math.fsum(everything) / len(everything), rel=1e-12, abs=1e-9)}


def test_names_come_sorted_and_together_or_alone():
    meter = Meter()
    meter.add_all({"b": torch.tensor(2.0), "a": 4.0}, 2)
    meter.add("b", torch.tensor([10.0]), torch.tensor(2))
    meter.add("c", torch.tensor(3, dtype=torch.int64), 1.0)
    assert list(meter.reduce().items()) == [("a", 2.0), ("b", 3.0), ("c", 3.0)]


def test_reduce_resets_and_declared_names_stay():
    meter = Meter(names=["val/elbo"])
    assert list(meter.reduce()) == ["val/elbo"]
    meter.add("val/elbo", 6.0, 3)
    assert meter.reduce() == {"val/elbo": 2.0}
    assert math.isnan(meter.reduce()["val/elbo"])
    assert Meter().reduce() == {}


def test_sums_of_many_small_values_keep_their_digits():
    meter = Meter()
    for _ in range(3000):
        meter.add("x", torch.tensor(16_777_217.0, dtype=torch.float64), 1)
        meter.add("x", torch.tensor(0.1, dtype=torch.float32), 1)
    assert meter.reduce()["x"] == pytest.approx((16_777_217.0 + float(torch.tensor(0.1))) / 2, rel=1e-12)


def test_graphs_are_not_kept_alive():
    meter = Meter()
    meter.add("x", torch.ones((), requires_grad=True) * 2, 1)
    assert not any(total.requires_grad for total in meter._sums.values())


def test_the_device_is_read_once_per_reduce_and_never_by_add():
    """Every read of a tensor's value goes through one of these methods."""
    reads = []
    names = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "cpu", "numpy")
    originals = {name: getattr(torch.Tensor, name) for name in names}

    def counting(name):
        return lambda self, *args, **kw: (reads.append(name), originals[name](self, *args, **kw))[1]

    with mock.patch.multiple(torch.Tensor, **{name: counting(name) for name in names}):
        meter = Meter()
        for _ in range(5):
            meter.add_all({f"kl/{i}": torch.tensor(float(i)) for i in range(30)}, torch.tensor(4))
            meter.add("loss", torch.tensor(1.0), 4)
        assert reads == []
        meter.reduce()
    assert reads == ["tolist"]


def test_one_collective_brings_the_ranks_together():
    calls = []

    def across(totals):
        calls.append(totals.shape)
        return totals + torch.tensor([[10.0, 0.0], [3.0, 0.0]], dtype=torch.float64)  # what another rank brought

    meter = Meter(names=["b"])
    meter.add("a", 2.0, 1)
    figures = meter.reduce(across)
    assert calls == [(2, 2)]
    assert figures["a"] == 12.0 / 4
    assert math.isnan(figures["b"])


def reduce_in_group(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=3)
    meter = Meter(names=["val/elbo", "val/bpd"])
    for value in ([1.0, 2.0, 6.0], [10.0], [])[rank]:  # the last rank has no sample at all
        meter.add_all({"val/bpd": value / 2, "val/elbo": value}, 1) if rank else meter.add("val/elbo", value, 1)
    torch.save(meter.reduce(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_three_processes_agree(tmp_path):
    multiprocessing.start_processes(reduce_in_group, (str(tmp_path),), nprocs=3, start_method="fork")
    figures = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(3)]
    assert figures == [{"val/bpd": 5.0, "val/elbo": 19 / 4}] * 3


def test_bits_per_dimension():
    assert bits_per_dimension(8 * math.log(2) * 3072, 3072) == pytest.approx(8)
    assert bits_per_dimension(96.2, 784) == pytest.approx(96.2 / 784 / 0.6931471805599453)


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_throughput_excludes_pauses_and_reports_waiting():
    clock = Clock()
    speed = Throughput(clock)
    assert speed.report() == {}
    assert math.isnan(speed.seconds_left(10))
    for _ in range(4):
        with speed.waiting():
            clock.now += 0.5
        clock.now += 1.5
        speed.count(64)
    with speed.paused():
        clock.now += 1000
    assert speed.report() == {"perf/images_per_second": 32.0, "perf/step_ms": 2000.0, "perf/data_wait": 0.25}
    assert speed.seconds_left(100) == 200.0
    clock.now += 1.0
    speed.count(64)
    assert speed.report() == {"perf/images_per_second": 64.0, "perf/step_ms": 1000.0, "perf/data_wait": 0.0}


def test_a_report_inside_a_pause_counts_training_alone():
    """Steps of 2 s; validation before the report and pictures after it, in the same pause. Every report is the same."""
    clock = Clock()
    speed = Throughput(clock)
    clock.now += 300  # restoring a checkpoint
    speed.restart()
    for _ in range(3):
        for _ in range(2):
            with speed.waiting():
                clock.now += 0.5
            clock.now += 1.5
            speed.count(64)
        with speed.paused():
            clock.now += 1000
            assert speed.report() == {"perf/images_per_second": 32.0, "perf/step_ms": 2000.0, "perf/data_wait": 0.25}
            clock.now += 50
        with speed.paused():
            clock.now += 7
    assert speed.report() == {}


def test_the_end_of_the_data_passes_through_waiting():
    with pytest.raises(StopIteration), Throughput().waiting():
        next(iter([]))


def test_gpu_memory_is_absent_without_a_gpu():
    assert gpu_memory(torch.device("cpu")) == {}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_memory_and_meter_on_a_gpu():
    held = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    assert gpu_memory(held.device)["perf/gpu_memory_gib"] >= 0.25
    meter = Meter("cuda")
    meter.add_all({"a": torch.tensor(2.0, device="cuda"), "b": torch.tensor(4.0, device="cuda")}, 2)
    with torch.cuda.device(0):
        torch.cuda.set_sync_debug_mode("error")
        try:
            meter.add("a", torch.tensor(2.0).cuda(non_blocking=True), 2)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert meter.reduce() == {"a": 1.0, "b": 2.0}


def test_active_units_are_judged_by_the_mean():
    """A unit at 0.3 and 0.0 nats is active on average, whichever process saw which."""
    first, second = (
        [torch.tensor([0.3, 0.0]), torch.tensor([0.0, 5.0, 0.15])],
        [torch.tensor([0.0, 0.15]), torch.tensor([0.1, 5.0, 0.11])],
    )
    run_on_all, apart = ActiveUnits(["a", "b"]), [ActiveUnits(["a", "b"]) for _ in range(2)]
    for batch, other in zip((first, second), apart, strict=True):
        run_on_all.add([units.double() for units in batch])
        other.add([units.double() for units in batch])
    brought = []
    apart[1].reduce(lambda totals: brought.append(totals) or totals)
    expected = {"active_units/a": 1.0, "active_units/b": 2.0}
    assert apart[0].reduce(lambda totals: totals + brought[0]) == expected
    assert run_on_all.reduce() == expected
    assert run_on_all.reduce() == {}


def test_nothing_to_add_adds_nothing():
    meter = Meter()
    meter.add_all({}, 1)
    assert meter.reduce() == {}


def test_extremes_over_processes():
    """A figure that a process lacks is that of the others; one process has no extremes."""
    slow, fast = {"perf/step_ms": 30.0, "perf/gpu_memory_gib": 5.0, "perf/mfu": 0.4}, {"perf/step_ms": 10.0}
    assert extremes([{"perf/step_ms": 15.0}, slow, fast, {"perf/step_ms": 20.0}]) == {
        "perf/step_ms_min": 10.0,
        "perf/step_ms_max": 30.0,
        "perf/gpu_memory_gib_min": 5.0,
        "perf/gpu_memory_gib_max": 5.0,
    }
    assert extremes([slow]) == {}


def test_host_memory_is_the_peak_of_this_process():
    stated = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]
    assert host_memory()["perf/host_memory_gib"] == pytest.approx(int(stated) * 1024 / 2**30, rel=0.02)
