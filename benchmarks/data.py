"""Reading and converting shard sets, in images per second, compared with webdataset and Pillow on the same files.

    python -m benchmarks.data [--rounds 5] [--parts access loader opening conversion]

  access      random access to 64x64 .npy images on one core; baseline: webdataset reading the same tars in order
  loader      batches of 512 as the trainer gets them (read, flip, collate, to tensor); baseline: webdataset with a
              DataLoader, which does the same one sample at a time
  opening     seconds and memory, without the imports, to open a set of 1,000,000 samples in a new process
  conversion  CelebA's JPEGs to 64 px on all cores; baseline: one process of Pillow and webdataset.ShardWriter. The
              images are those of REAL_DATA_DIR/celeba, or synthetic ones of the same size if it is not set

Memory is read from /proc, so opening and conversion need Linux.

The two sides run in turns, and a ratio is the median over the rounds. Run it on an idle machine.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from shard_data.manifest import fingerprint

BATCH = 512
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Row(NamedTuple):
    """One line of the table."""

    name: str
    figure: str
    baseline: str
    ratio: float | None
    target: str


def measure_in_turns(name: str, candidates: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Images per second of each candidate in each round. They run in turns; the first round is a warm-up."""
    speeds: dict[str, list[float]] = {candidate: [] for candidate in candidates}
    for number in tqdm(range(rounds + 1), desc=name, unit="round"):
        for candidate, run in candidates.items():
            speed = run()
            if number:
                speeds[candidate].append(speed)
    return speeds


def row(name: str, ours: list[float], theirs: list[float], baseline: str, target: str) -> Row:
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    figure = f"{statistics.median(ours):,.0f} images/s"
    return Row(name, figure, f"{baseline}: {statistics.median(theirs):,.0f}", ratio, target)


def table(rows: list[Row]) -> str:
    lines = ["| benchmark | result | baseline | ratio | target |", "|---|---|---|---|---|"]
    for name, figure, baseline, ratio, target in rows:
        lines.append(f"| {name} | {figure} | {baseline} | {'' if ratio is None else f'{ratio:.1f}'} | {target} |")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------- shard sets


class Noise:
    """A source of random images; npy stores any images at the same speed."""

    name = "noise"
    classes = tuple(map(str, range(10)))
    attributes = None
    columns = frozenset({"label"})
    splits = ("train",)

    def __init__(self, size: int, channels: int, count: int):
        self.image_shape = (size, size, channels)
        self.count = count

    def transform(self) -> dict:
        return {}

    def description(self) -> dict:
        return {}

    def records(self, _split: str) -> list:
        from shard_data.source import Record

        return [Record(f"{number:07d}", number) for number in range(self.count)]

    def load(self, record):
        from shard_data.source import Sample

        rng = np.random.default_rng(record.where)
        return Sample(rng.integers(0, 256, self.image_shape, dtype=np.uint8), label=record.where % 10)


def noise_set(folder: Path, size: int, channels: int, count: int) -> Path:
    from shard_data.writer import convert

    root = folder / f"noise{size}"
    convert(Noise(size, channels, count), root, shard_size=2000)
    return root


def stock(root: Path):
    """webdataset on the tars of a set, in their order, decoded."""
    import webdataset

    tars = [str(path) for path in sorted(root.glob("*.tar"))]
    return webdataset.WebDataset(tars, shardshuffle=False).decode()


# ------------------------------------------------------------------------------------------------------- random access


def access(folder: Path, rounds: int) -> list[Row]:
    from pipeline.data.shards import TarShards

    count = 20_000
    root = noise_set(folder, 64, 3, count)
    shards = TarShards(root, "train")
    order = np.random.default_rng(0).permutation(count)

    def ours() -> float:
        start = time.perf_counter()
        for first in range(0, count, BATCH):
            shards.images(order[first : first + BATCH])
        return count / (time.perf_counter() - start)

    def theirs() -> float:
        start, number = time.perf_counter(), 3000
        for sample in islice(stock(root), number):
            assert sample["npy"].shape == (64, 64, 3)
        return number / (time.perf_counter() - start)

    with one_core():
        speeds = measure_in_turns("access", {"ours": ours, "theirs": theirs}, rounds)
    target = "250,000 images/s, ratio 8"
    return [row("random access, 64 px, one core", speeds["ours"], speeds["theirs"], "webdataset in order", target)]


class one_core:  # noqa: N801 - used as a context manager
    """Keeps this process and its children on one core, if the system supports it."""

    def __enter__(self):
        if hasattr(os, "sched_setaffinity"):
            self.cores = os.sched_getaffinity(0)
            os.sched_setaffinity(0, {min(self.cores)})

    def __exit__(self, *_):
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, self.cores)


# -------------------------------------------------------------------------------------------------------------- loader


def loader(folder: Path, rounds: int) -> list[Row]:
    rows = []
    for size, channels, count, target in ((64, 3, 20_000, "65,000"), (28, 1, 60_000, "250,000")):
        root = noise_set(folder, size, channels, count)
        candidates = {f"workers={n}": lambda root=root, n=n: trainer_loader(root, n) for n in (0, 1, 2)}
        candidates["floats"] = lambda root=root: trainer_loader(root, 1, floats=True)
        candidates["stock"] = lambda root=root: stock_loader(root, CORES)
        speeds = measure_in_turns(f"loader {size} px", candidates, rounds)
        theirs = speeds.pop("stock")
        for candidate, ours in speeds.items():
            name = f"loader, {size} px, {'workers=1, scaled to floats' if candidate == 'floats' else candidate}"
            goal = f"{target} images/s by any" if candidate != "floats" else ""
            rows.append(row(name, ours, theirs, f"webdataset, {CORES} workers", goal))
    return rows


def trainer_loader(root: Path, workers: int, floats: bool = False) -> float:
    """Images per second after the first batch."""
    from pipeline.data.loader import build_train_loader
    from pipeline.data.order import Order
    from pipeline.data.preprocess import Preprocess, to_model_input
    from pipeline.data.shards import TarShards

    shards = TarShards(root, "train")
    batches = 3 * len(shards) // BATCH
    order, preprocess = Order(shards.shard_sizes, 0, 32), Preprocess(0, flip=True)
    stream = iter(
        build_train_loader(shards, preprocess, order, micro_batch=BATCH, start=0, stop=batches, workers=workers)
    )
    return timed(stream, to_model_input if floats else None)


def timed(stream, use: Callable | None) -> float:
    """Images per second of a stream of batches, without the first one, which includes the start of the processes."""
    next(stream)
    start, seen = time.perf_counter(), 0
    for batch in stream:
        seen += len(batch[0])
        if use:
            use(batch[0])
    return seen / (time.perf_counter() - start)


def stock_loader(root: Path, workers: int) -> float:
    """webdataset with the same work: flip, to tensor, collate."""
    import torch
    from torch.utils.data import DataLoader

    rng = np.random.default_rng(0)

    def prepare(sample: dict) -> tuple[torch.Tensor, int]:
        image = sample["npy"][:, ::-1] if rng.random() < 0.5 else sample["npy"]
        return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))), sample["cls"]

    dataset = stock(root).map(prepare).batched(BATCH, partial=False)
    return timed(islice(DataLoader(dataset, batch_size=None, num_workers=workers), 12), None)


# -------------------------------------------------------------------------------------------------------------- opening

OPENING = """
import os, sys, time
from pathlib import Path
import numpy as np
from pipeline.data.order import Order
from pipeline.data.shards import TarShards
def memory():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
before, start = memory(), time.perf_counter()
shards = TarShards(sys.argv[1], "train")
order = Order(shards.shard_sizes, 0, 32)
assert len(shards) == 1_000_000
opened, memory_opened = time.perf_counter() - start, memory() - before
shards.images(order.at(np.arange(512))[1])
print(opened, memory_opened, time.perf_counter() - start, memory() - before)
"""


def opening(folder: Path, rounds: int) -> list[Row]:
    root = million(folder)
    runs = [run_script(OPENING, str(root)) for _ in tqdm(range(rounds), desc="opening", unit="round")]
    seconds, mib, first, first_mib = (statistics.median(column) for column in zip(*runs, strict=True))
    return [
        Row("opening 1,000,000 samples", f"{seconds:.3f} s, {mib:.0f} MiB", "", None, "0.2 s, 100 MB"),
        Row("the same with a first batch of 512", f"{first:.3f} s, {first_mib:.0f} MiB", "", None, ""),
    ]


def million(folder: Path) -> Path:
    """A set of 500 shards of 2,000 samples: hard links to one shard."""
    root = noise_set(folder / "one", 28, 1, 2000)
    manifest = json.loads((root / "manifest.json").read_text())
    (shard,) = manifest["splits"]["train"]["shards"]
    shards = []
    for number in range(500):
        names = {"file": f"train-{number:06d}.tar", "index": f"train-{number:06d}.index.npy"}
        for kind, name in names.items():
            if not (root / name).exists():
                os.link(root / shard[kind], root / name)
        shards.append(shard | names)
    manifest["splits"]["train"] = {"count": 1_000_000, "shards": shards}
    manifest["fingerprint"] = fingerprint(manifest)
    (root / "manifest.json").write_text(json.dumps(manifest))
    return root


def run_script(script: str, *arguments: str) -> list[float]:
    """The numbers that a script prints, in a new process."""
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [float(number) for number in done.stdout.split()]


# ----------------------------------------------------------------------------------------------------------- conversion

OURS = """
import sys, time
from shard_data import CelebA, convert
if __name__ == "__main__":
    source, out, encoding, workers = sys.argv[1:]
    start = time.perf_counter()
    manifest = convert(CelebA(source, size=64), out, encoding=encoding, workers=int(workers), partial=True)
    print(sum(split["count"] for split in manifest["splits"].values()), time.perf_counter() - start)
"""
THEIRS = """
import sys, time
from pathlib import Path
import numpy as np
import webdataset
from PIL import Image
source, out, encoding = sys.argv[1:]
start, count = time.perf_counter(), 0
with webdataset.ShardWriter(out + "/train-%06d.tar", maxcount=2000, verbose=0) as writer:
    attributes = (line.split() for line in (Path(source) / "list_attr_celeba.txt").read_text().splitlines()[2:])
    for name, *values in attributes:
        path = Path(source) / "img_align_celeba" / name
        if not path.exists():
            continue
        with Image.open(path) as original:
            image = original.crop((15, 40, 163, 188)).resize((64, 64), Image.Resampling.BILINEAR)
        writer.write({
            "__key__": path.stem,
            encoding: np.asarray(image) if encoding == "npy" else image,
            "json": {"attributes": [int(value) for value in values]},
        })
        count += 1
print(count, time.perf_counter() - start)
"""


def conversion(folder: Path, rounds: int) -> list[Row]:
    source, kind = celeba_source(folder)
    rows = []
    for encoding in ("npy", "png"):
        candidates = {
            "ours": lambda e=encoding: converted(OURS, source, e, str(CORES)),
            "theirs": lambda e=encoding: converted(THEIRS, source, e),
        }
        speeds = measure_in_turns(f"conversion {encoding}", candidates, rounds)
        name = f"{kind} to 64 px {encoding}, {CORES} workers"
        rows.append(row(name, speeds["ours"], speeds["theirs"], "Pillow and ShardWriter, one process", "ratio 2.2"))
    rows.append(Row("memory of that conversion", conversion_memory(source), "", None, "600 MB"))
    return rows


def celeba_source(folder: Path) -> tuple[Path, str]:
    """CelebA's folder and its name in the table."""
    real = os.environ.get("REAL_DATA_DIR")
    if real and (Path(real) / "celeba").is_dir():
        return Path(real) / "celeba", "CelebA sample"
    return synthetic_celeba(folder / "celeba", 3000), "CelebA-like JPEGs"


def synthetic_celeba(folder: Path, count: int) -> Path:
    """JPEGs of 178 x 218, about as large and as slow to decode as photographs, with CelebA's lists."""
    from PIL import Image

    (folder / "img_align_celeba").mkdir(parents=True)
    names = [f"{number:06d}.jpg" for number in range(1, count + 1)]
    for number, name in enumerate(tqdm(names, desc="synthetic JPEGs", unit="image")):
        small = np.random.default_rng(number).integers(0, 256, (44, 36, 3), dtype=np.uint8)
        image = Image.fromarray(small).resize((178, 218), Image.Resampling.BICUBIC)
        image.save(folder / "img_align_celeba" / name, "JPEG", quality=90)
    titles = [f"Attribute_{i:02d}" for i in range(40)]
    rows = [f"{name} " + " ".join(["-1", " 1"] * 20) for name in names]
    (folder / "list_attr_celeba.txt").write_text("\n".join([str(count), " ".join(titles), *rows]) + "\n")
    (folder / "list_eval_partition.txt").write_text("".join(f"{name} 0\n" for name in names))
    return folder


def converted(script: str, source: Path, encoding: str, *more: str) -> float:
    """Images per second of a conversion in a new process, without its imports."""
    with tempfile.TemporaryDirectory() as out:
        count, seconds = run_script(script, str(source), out, encoding, *more)
    return count / seconds


def conversion_memory(source: Path) -> str:
    """Highest sum of PSS over the processes of one conversion, sampled every 20 ms."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-c", OURS, str(source), out, "npy", str(CORES)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            peak = 0
            while process.poll() is None:
                peak = max(peak, sum(map(pss, family(process.pid))))
                time.sleep(0.02)
    return f"{peak / 2**20:.0f} MiB of PSS, {CORES} workers"


def family(pid: int) -> list[int]:
    """A process and its living descendants."""
    try:
        text = "".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children"))
    except OSError:
        return [pid]
    return [pid, *(member for child in text.split() for member in family(int(child)))]


def pss(pid: int) -> int:
    """Proportional set size in bytes; 0 for a process that has ended."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in io.StringIO(text) if line.startswith("Pss:"))


PARTS = {"access": access, "loader": loader, "opening": opening, "conversion": conversion}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds, after one round of warm-up (default 5)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    arguments = parser.parse_args()
    rows = []
    for part in arguments.parts:
        with tempfile.TemporaryDirectory() as folder:
            rows += PARTS[part](Path(folder), arguments.rounds)
    print(table(rows))


if __name__ == "__main__":
    main()
