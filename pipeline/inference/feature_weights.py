"""The weights of the Inception network that FID, KID, precision and recall are defined with: found, fetched, verified.

One published file serves pytorch-fid and torch-fidelity: the weights of TensorFlow's Inception model of 2015-12-05
(Apache-2.0), in PyTorch's names. It is used only if its size and sha256 are right.
"""

import hashlib
import io
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipeline.evaluation.inception import Inception
from shard_data.fetch import Expected, FetchFailed, fetch
from shard_data.file_lock import FileLock
from shard_data.files import read_bounded, replacing
from shard_data.progress import advance

log = logging.getLogger("pipeline")


class WeightsFile(NamedTuple):
    """A published file."""

    names: tuple[str, ...]
    """Under which programs keep it in torch hub's cache; the first is the one that it is fetched to."""
    address: str
    size: int
    """Bytes."""
    sha256: str


INCEPTION = WeightsFile(
    names=("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth"),
    address="https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    size=95_628_359,
    sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
)


def load_feature_network(path: Path | None, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The Inception network in eval mode, from a file of its weights; None: of torch hub's cache, or fetched into it.

    Raises ValueError, which names the file and the fix, where there is none or it is another one.
    """
    tensors = read_weights(path or find_weights())
    with torch.device("meta"):
        network = Inception()
    network.load_state_dict(tensors, assign=True)
    return network.requires_grad_(False).eval().to(device, dtype)


def hub_folder() -> Path:
    """Where torch hub keeps weights: TORCH_HOME/hub/checkpoints."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def find_weights() -> Path:
    """The file in torch hub's cache. It is fetched if it is not there. Raises ValueError where that fails."""
    folder = hub_folder()
    found = [folder / name for name in INCEPTION.names if (folder / name).exists()]
    if found:
        return found[0]
    path = folder / INCEPTION.names[0]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_name(f"{path.name}.lock")).acquire(math.inf, _log_wait, advance)
        try:
            if not path.exists():  # another process may have fetched it
                _fetch(path)
        finally:
            lock.release(delete=True)
    except (FetchFailed, OSError) as error:
        reason = error.reason if isinstance(error, FetchFailed) else f"{folder}: {error.strerror}"
        raise ValueError(
            f"the Inception weights {path.name} ({INCEPTION.size:,} bytes, sha256 {INCEPTION.sha256}) are not in "
            f"{folder}, and could not be fetched from {INCEPTION.address} ({reason}); put the file there, or name it "
            "with --feature-weights FILE"
        ) from None
    return path


def _log_wait(holder: str) -> None:
    log.info("waiting for the Inception weights that %s fetches", holder)


def _fetch(path: Path) -> None:
    log.info("fetching the Inception weights (%.0f MB) from %s into %s", INCEPTION.size / 1e6, INCEPTION.address, path)
    with replacing(path) as target:
        fetch(INCEPTION.address, target, Expected(INCEPTION.size, INCEPTION.size, "sha256", INCEPTION.sha256))


def read_weights(path: Path) -> Mapping[str, Tensor]:
    """The tensors of the published file, without counters of batches. What is hashed are the bytes that are used.

    Raises ValueError for a file that cannot be read, and for any other file, of which nothing is unpickled.
    """
    expected = f"the file of the Inception weights has {INCEPTION.size:,} bytes and sha256 {INCEPTION.sha256}"
    fix = "put that file there, or name it with --feature-weights FILE"
    try:
        size = path.stat().st_size
        content = read_bounded(path, INCEPTION.size, follow=True) if size == INCEPTION.size else None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; {expected}") from None
    if content is None:
        raise ValueError(f"{path}: has {size:,} bytes, and {expected}; {fix}")
    digest = hashlib.sha256(content).hexdigest()
    if digest != INCEPTION.sha256:
        raise ValueError(f"{path}: has sha256 {digest}, and {expected}; {fix}")
    tensors = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("num_batches_tracked")}
