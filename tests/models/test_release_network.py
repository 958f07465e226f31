"""A setting is an option of a release, or a model with another value of it is refused by name."""

from typing import Any, get_args

import pytest

from pipeline.models import nvae_options, vdvae_conversion
from pipeline.models.base import ModelConfig
from pipeline.models.likelihoods import LogisticMixtureLikelihood
from pipeline.models.nvae import NVAEConfig
from pipeline.models.nvae_options import ReleaseOptions
from pipeline.models.release_network import Network
from pipeline.models.vdvae import VDVAEConfig
from pipeline.models.vdvae_conversion import config_from_reference
from pipeline.nn.distributions import BinRule
from tests.helpers.vdvae_files import TINY

OPTIONS = {
    "encoder_blocks": "16x1,16d2,8x1,8d4,2x1",
    "decoder_blocks": "2x1,8m2,16m8",
    "width": 8,
    "widths": "2:12",
    "bottleneck": 0.25,
    "latent_channels": 3,
    "start_tensors_up_to": 16,
    "likelihood.num_components": 3,
}
REFUSED = [
    ("pixel_mean", 127.5),
    ("pixel_std", 127.5),
    ("likelihood.name", "bernoulli"),
    ("likelihood.bin_rule", "published"),
    ("likelihood.bin_rule", "vdvae_overlapping_5_bit"),
    ("likelihood.scale", "softplus"),
    ("likelihood.scale_beta", 0.5),
    ("likelihood.min_log_scale", -5.0),
]


def changed(name: str, value: Any) -> VDVAEConfig:
    """The tiny VDVAE with another value of a setting."""
    if name == "likelihood.name":
        return VDVAEConfig.model_validate(TINY | {"likelihood": {"name": value}})
    if name.startswith("likelihood."):
        return VDVAEConfig.model_validate(TINY | {"likelihood": TINY["likelihood"] | {name.split(".")[1]: value}})
    return VDVAEConfig.model_validate(TINY | {name: value})


def options_of_vdvae(config: ModelConfig, border: int = 0, bits: int = 8) -> dict[str, Any]:
    return vdvae_conversion.options_for(Network(config, (3, 16, 16), border, bits))


def test_each_setting_is_tried():
    settings = VDVAEConfig.model_fields.keys() - {"name", "likelihood"}
    settings |= {f"likelihood.{name}" for name in LogisticMixtureLikelihood.model_fields}
    assert settings == {*OPTIONS, *(name for name, _ in REFUSED)}


@pytest.mark.parametrize(("name", "value"), OPTIONS.items())
def test_a_setting_of_vdvae_is_an_option(name, value):
    config = changed(name, value)
    assert config != VDVAEConfig.model_validate(TINY)
    assert config_from_reference(options_of_vdvae(config)) == config


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_a_setting_of_vdvae_that_is_no_option_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"model\.{name}={value}\b"):
        options_of_vdvae(changed(name, value))


@pytest.mark.parametrize(
    ("dataset", "accepted"),
    [("cifar10", {"vdvae", "exact"}), ("ffhq_256", {"vdvae_overlapping_5_bit"})],
)
def test_bin_rules_of_other_papers_are_refused(dataset, accepted):
    """`exact` differs from VDVAE's rule for 8 bits in improbable bins only. NVAE's and Efficient-VDVAE's rules give
    other levels the upper tail."""
    mean, std = vdvae_conversion.PIXELS[dataset]
    for rule in get_args(BinRule):
        config = changed("likelihood.bin_rule", rule).model_copy(update={"pixel_mean": mean, "pixel_std": std})
        if rule in accepted:
            assert options_of_vdvae(config)["dataset"] == dataset
        else:
            with pytest.raises(ValueError, match=rf"model\.likelihood\.bin_rule={rule} \(it has vdvae"):
                options_of_vdvae(config)


def test_all_differences_are_named_with_what_the_release_has():
    with pytest.raises(ValueError) as error:
        options_of_vdvae(changed("likelihood.scale", "softplus"), border=2, bits=5)
    assert str(error.value) == (
        "the release has no option for model.likelihood.scale=softplus (it has exp), data.size=12 (it has 16), "
        "data.pad=2 (it has 0), data.bits=5 (it has 8) with images like those of its data set cifar10"
    )


class LaterVDVAEConfig(VDVAEConfig):
    later: bool = False


class LaterNVAEConfig(NVAEConfig):
    later: bool = False


def test_a_setting_that_is_added_to_a_model_is_refused(monkeypatch):
    """Until the conversion writes it."""
    monkeypatch.setattr(vdvae_conversion, "VDVAEConfig", LaterVDVAEConfig)
    assert options_of_vdvae(LaterVDVAEConfig.model_validate(TINY))
    with pytest.raises(ValueError, match=r"model\.later=true \(it has false\)"):
        options_of_vdvae(LaterVDVAEConfig.model_validate(TINY | {"later": True}))
    monkeypatch.setattr(nvae_options, "NVAEConfig", LaterNVAEConfig)
    network = Network(LaterNVAEConfig(), (3, 32, 32), 0, 8)
    assert ReleaseOptions(**nvae_options.options_for(network)).network() == network
    with pytest.raises(ValueError, match=r"model\.later=true \(it has false\)"):
        nvae_options.options_for(network._replace(config=LaterNVAEConfig(later=True)))
