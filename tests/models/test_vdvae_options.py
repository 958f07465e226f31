"""The strings that describe VDVAE: what they mean, and what is refused with which message."""

import pytest
from pydantic import ValidationError

from pipeline.config import ConfigError
from pipeline.models.vdvae import VDVAE, VDVAEConfig
from pipeline.models.vdvae_options import MAX_BLOCKS, parse_options
from pipeline.recipe import load_recipe, recipe_path
from tests.helpers.vdvae_cases import SMALL_VDVAE, build_vdvae

FACES = (
    "model={name: vdvae, encoder_blocks: '32x1,32d2,16x1,16d4,4x1', decoder_blocks: '4x1,16m4,32m16', width: 8}",
    "data.size=32",
    "regularizers.strength=0",
)


def test_tokens_with_a_factor_or_a_mix_in_are_blocks():
    options = parse_options("8x2,8d2,4x1,4d4,1x2", "1x1,4m1,4,8m4,8x2", 16, " 1:24, 4:20 ")
    assert options.encoder == ((8, None), (8, None), (8, 2), (4, None), (4, 4), (1, None), (1, None))
    assert options.decoder == ((1, None), (4, 1), (4, None), (8, 4), (8, None), (8, None))
    assert options.widths == {8: 16, 4: 20, 1: 24}
    assert options.size == 8


def test_a_resolution_may_be_returned_to():
    """Its groups are counted on, and the state that is mixed in is the latest."""
    model = build_vdvae(decoder_blocks="2x1,8m2,2x1,8m2,16m8,8m2,16m8")
    names = [group.name for group in model.groups]
    assert names == ["2x2_group00", "8x8_group00", "2x2_group01", "8x8_group01", "16x16_group00", "8x8_group02",
                     "16x16_group01"]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_blocks": "16x1,16m8"}, "model.encoder_blocks: '16m8' is not a block; a block of the encoder is R"),
        ({"decoder_blocks": "2x1,8d2"}, "model.decoder_blocks: '8d2' is not a block; a block of the decoder is R"),
        ({"encoder_blocks": "16x1,,8x1"}, "model.encoder_blocks: '' is not a block"),
        ({"encoder_blocks": "16x0"}, "16x0: numbers are at least 1"),
        ({"encoder_blocks": "999999x1"}, "999999x1: numbers are at least 1, resolutions at most 16,384"),
        ({"encoder_blocks": f"16x{MAX_BLOCKS},16x1"}, "model.encoder_blocks: more than 1,000 blocks"),
        ({"decoder_blocks": "2x999999"}, "model.decoder_blocks: more than 1,000 blocks"),
        ({"encoder_blocks": "16x1,8x1"}, "a block at resolution 8 follows one that leaves resolution 16"),
        ({"encoder_blocks": "16d3"}, "16d3: resolution 16 can be pooled by a factor that divides it and is at least 2"),
        ({"encoder_blocks": "16d1"}, "16d1: resolution 16 can be pooled by a factor that divides it and is at least 2"),
        ({"decoder_blocks": "2x1,4m2,16m4"}, "4m2: model.encoder_blocks has no resolution 4; it has 16, 8, 2"),
        ({"decoder_blocks": "2x1,16m8,16x1"}, "16m8: no block before it has resolution 8"),
        ({"decoder_blocks": "2x1,8m2,2m8,16m8"}, "2m8: 8 must be a smaller resolution that divides 2"),
        ({"decoder_blocks": "2x1,8m2"}, "no block has the images' resolution, 16"),
        ({"decoder_blocks": "8x1,16m8", "widths": ""}, "no block has resolution 2, the lowest of model.encoder_blocks"),
        ({"decoder_blocks": "2x1,8x1,16m8"}, "nothing uses what the last block at resolution 2 computes; mix it in"),
        ({"decoder_blocks": "2x1,8m2,16m8,8x1"}, "nothing uses what the last block at resolution 8 computes"),
        ({"widths": "8:12,2:10"}, "10 channels at resolution 2 are fewer than 12 at 8; widths must not shrink"),
        ({"widths": "2:4"}, "4 channels at resolution 2 are fewer than 8 at 8"),
        ({"widths": "4:16"}, "4:16: give a width once for a resolution of model.encoder_blocks: 16, 8, 2"),
        ({"widths": "2:8,2:9"}, "2:9: give a width once"),
        ({"widths": "2=16"}, "model.widths: '2=16' is not RESOLUTION:CHANNELS, for instance 8:512"),
        ({"bottleneck": 0.1}, "model.bottleneck=0.1 leaves no inner channel of the 8 at resolution 16; it must be at"),
    ],
)  # fmt: skip
def test_what_cannot_be_built_is_refused_with_the_reason(changes, message):
    with pytest.raises(ValidationError) as error:
        VDVAEConfig(**(SMALL_VDVAE | changes))
    assert message in str(error.value)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match="starts at resolution 16, but the images have 20x20 pixels, padding included"):
        VDVAE(VDVAEConfig(**SMALL_VDVAE), (3, 20, 20), 2)


def test_a_message_reaches_the_command_line():
    with pytest.raises(ConfigError, match="model.encoder_blocks starts at resolution 32, but the images have 36x36"):
        load_recipe(recipe_path("nvae"), [*FACES, "data.pad=2"])
    with pytest.raises(ConfigError, match="8m4: model.encoder_blocks has no resolution 8"):
        load_recipe(recipe_path("nvae"), [*FACES, "model.decoder_blocks='4x1,8m4,32m8'"])


def test_the_overlapping_rule_needs_images_of_8_bits():
    rule = "model.likelihood={name: logistic_mixture, bin_rule: vdvae_overlapping_5_bit}"
    assert load_recipe(recipe_path("nvae"), [*FACES, rule, "data.bits=8"]).model.likelihood.makes_5_bits
    with pytest.raises(ConfigError, match="data.bits=5: .*makes 5 bits of 8-bit images itself; set data.bits=8"):
        load_recipe(recipe_path("nvae"), [*FACES, rule, "data.bits=5"])
