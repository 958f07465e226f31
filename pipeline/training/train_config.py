"""The settings of the training loop."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from pipeline.distributed.device_settings import DeviceSettings
from pipeline.distributed.runtime import Precision
from pipeline.schema import Section

Recompute = Literal["none", "norms", "cells"]


class TrainConfig(Section):
    """Length, batch size, precision and processes."""

    steps: int | None = Field(None, gt=0, le=10**12)
    """Optimizer steps of the whole run. Give this or `epochs`."""
    epochs: float | None = Field(None, gt=0, le=10**9)
    """Passes over the training split. Give this or `steps`."""
    batch_size: int = Field(32, gt=0, lt=2**31)
    """Images per optimizer step over all processes."""
    micro_batch: Annotated[int, Field(gt=0)] | Literal["auto"] | None = None
    """Images per forward pass over all processes; gradients accumulate up to `batch_size`. Default: the whole batch.
    Batch norm's statistics are those of one micro-batch over all processes, so the result depends on this number.
    `auto`: the largest that fits in memory, found at the start of the run, which keeps it."""
    seed: int = Field(1, ge=0, lt=2**63)
    """Of initial weights, data order, augmentation and latent noise."""
    precision: Precision = "fp32"
    """`bf16`: mixed precision by autocast (densities, KL and likelihoods stay in float32). `fp64` is for tests."""
    channels_last: bool = True
    """Memory layout of images and activations; faster for convolutions on CPUs and GPUs."""
    compile: Literal["off", "cells", "whole"] = "off"
    """What torch.compile compiles. `cells`: the model's cells one by one. `whole`: the model's training pass and the
    objective; validation and samples stay eager. It takes minutes before the first step; compiled code is kept in
    TORCHINDUCTOR_CACHE_DIR for the next start. A process may take `progress_timeout` longer than the others for it."""
    tf32: bool = True
    """On GPUs, TensorFloat-32 for convolutions and matrix products of float32 numbers: 10 bits of mantissa, several
    times as fast."""
    cudnn_benchmark: bool = True
    """On GPUs, time the algorithms for each shape of a convolution at its first use, and keep the fastest; not with
    `deterministic`."""
    deterministic: bool = False
    """The same machine gives the same numbers to the bit in every run: deterministic algorithms only, which are slower
    on GPUs. CPUs do so without it."""
    ddp_bucket_mb: int = Field(25, gt=0, le=2**16)
    """With several processes, MiB of gradients that one collective averages, while backward computes the next ones."""
    recompute: Recompute = "none"
    """Activations that the backward pass computes again instead of keeping them; the results are the same. `norms`:
    those of batch norms and activations in front of convolutions. `cells`: all inside of each cell."""
    ema_decay: float = Field(0.0, ge=0, lt=1)
    """Decay of the moving average of weights that validation and samples use; 0: none."""
    ema_warmup: bool = True
    """Whether that decay is at most (1 + step) / (10 + step), so that the initial weights fade quickly. false: the same
    decay from the first step, as in VDVAE."""
    cpu_threads: int | None = Field(None, gt=0, le=2**12)
    """Threads of each process on CPU. Default: this machine's cores shared by its processes."""
    profile: int = Field(0, ge=0, le=1000)
    """Record this number of steps, after the first eleven, with torch's profiler: the trace of each process in
    profile/ of the run folder, the most expensive operators in log.txt. 0: none."""
    expect_processes: int | None = Field(None, gt=0)
    """Required number of processes; training with another number is refused."""
    collective_timeout: float = Field(120.0, gt=0, le=10**9)
    """Seconds that processes wait for a rank in a collective; then all end, and the message names that rank."""
    progress_timeout: float = Field(600.0, gt=0, le=10**9)
    """Seconds that work which other processes wait for (hashing, fetching, making shards, reading or writing a
    checkpoint) may make no progress; then all end, and the message names the work."""
    max_skipped_steps: int = Field(20, gt=0)
    """Number of consecutive skipped steps that ends the run: steps with a non-finite loss or gradient, or with a
    gradient that `optim.skip_threshold` skips."""

    @field_validator("micro_batch", mode="before")
    @classmethod
    def _check_micro_batch(cls, value: Any) -> Any:
        """One message for the two kinds of value."""
        if value is None or value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
            return value
        raise ValueError(f"needs a whole number above 0, or auto (given: {value!r})")

    @field_validator("compile", mode="before")
    @classmethod
    def _read_switch(cls, value: Any) -> Any:
        """YAML reads `off` as false; `true` and `false` were the values before there was `whole`."""
        return {True: "cells", False: "off"}[value] if isinstance(value, bool) else value

    @property
    def device_settings(self) -> DeviceSettings:
        """What torch chooses on a GPU."""
        return DeviceSettings(self.cudnn_benchmark, self.tf32, self.deterministic)

    @property
    def images_per_pass(self) -> int:
        """Images per forward pass over all processes. The whole batch as long as `micro_batch` is `auto`."""
        return self.micro_batch if isinstance(self.micro_batch, int) else self.batch_size

    @property
    def micro_batches(self) -> int:
        """Forward passes per optimizer step."""
        return self.batch_size // self.images_per_pass
