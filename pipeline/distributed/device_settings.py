"""What torch chooses on a GPU: the kernels of convolutions, TensorFloat-32, deterministic algorithms."""

import os
import warnings
from typing import NamedTuple

import torch


class DeviceSettings(NamedTuple):
    """Settings of this process. On CPUs only `deterministic` has an effect."""

    cudnn_benchmark: bool = True
    """Time cuDNN's algorithms for each shape of a convolution, and use the fastest; not with `deterministic`."""
    tf32: bool = True
    """TensorFloat-32 for float32 convolutions and matrix products."""
    deterministic: bool = False
    """Deterministic algorithms only; torch raises RuntimeError for an operator that has none."""

    def apply(self) -> None:
        """Call before the process uses CUDA: cuBLAS reads its variable when it starts.

        Every operator of the models has a deterministic form: torch computes the gradient of bilinear upsampling, the
        only one whose kernel adds in changing order, by another algorithm in this mode.
        """
        cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
        cudnn.benchmark = self.cudnn_benchmark and not self.deterministic
        cudnn.deterministic = self.deterministic
        with warnings.catch_warnings():
            # torch announces other names for these two. It raises where both kinds are used, and Accelerate uses these.
            warnings.filterwarnings("ignore", message=".*TF32", category=UserWarning)
            cuda.matmul.allow_tf32 = cudnn.allow_tf32 = self.tf32
        if self.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        if self.deterministic != torch.are_deterministic_algorithms_enabled():  # the call imports the compiler
            torch.use_deterministic_algorithms(self.deterministic)


DEFAULT_SETTINGS = DeviceSettings()
