"""Small VDVAEs, and the golden files of its reference release."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.models.vdvae import VDVAE, VDVAEConfig
from pipeline.models.vdvae_conversion import config_from_reference, name_from_reference
from tests.helpers import golden

SMALL_VDVAE = {
    "encoder_blocks": "16x1,16d2,8x1,8d4,2x1",
    "decoder_blocks": "2x2,8m2,16m8,16x1",
    "width": 8,
    "widths": "2:12",
    "bottleneck": 0.5,
    "latent_channels": 3,
    "start_tensors_up_to": 8,
}


def build_vdvae(
    size: int = 16, channels: int = 3, bits: int = 8, border: int = 0, condition_size: int = 0, **changes
) -> VDVAE:
    torch.manual_seed(0)
    return VDVAE(VDVAEConfig(**(SMALL_VDVAE | changes)), (channels, size, size), border, bits, condition_size)


def golden_file(name: str):
    """A pytest parameter; skipped, with the reason, where there is no folder."""
    folder = golden.golden_folder()
    skipped = [pytest.mark.skip(reason="NVAE_GOLDEN_DIR is not set")] if folder is None else []
    return pytest.param(folder and folder / "vdvae" / f"{name}.pt", id=name, marks=skipped)


class VDVAECase:
    """One golden file and what is built from its options."""

    def __init__(self, path: Path):
        self.file = golden.load(path)
        self.args = self.file["args"]
        self.x = self.file["x_uint8"].double().to(golden.DEVICE) / 255

    def new_model(self) -> VDVAE:
        size = self.args["image_size"]
        return VDVAE(config_from_reference(self.args), (3, size, size))

    def model(self, dtype: torch.dtype = torch.float64) -> VDVAE:
        model = self.new_model()
        model.load_state_dict({name_from_reference(name): value for name, value in self.file["state_dict"].items()})
        return model.to(golden.DEVICE, dtype)

    def noise(self, key: str = "eps") -> list[Tensor]:
        return golden.noise(self.file, key)
