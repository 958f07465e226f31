"""Mistakes in reading and writing checkpoints of other implementations."""

from tests.mutations.mutation import Mutation

HOSTILE = ("tests/storage/test_pickled_checkpoint.py",)


def nvlabs(name: str) -> tuple[str, ...]:
    return (f"tests/inference/test_nvlabs.py::test_{name}",)


MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        "convert: a pickle may name what torch allows",
        "pipeline/storage/pickled_checkpoint.py",
        "    others = sorted(set(_globals_of(pickle)) - GLOBALS)",
        "    others = []",
        HOSTILE,
    ),
    Mutation(
        "convert: members may be compressed",
        "pipeline/storage/pickled_checkpoint.py",
        "member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size or ",
        "",
        HOSTILE,
    ),
    Mutation(
        "convert: a second directory is not noticed",
        "pipeline/storage/pickled_checkpoint.py",
        "    _check_directory(file)\n",
        "    file.seek(0)\n",
        HOSTILE,
    ),
    Mutation(
        "convert: checksums are not compared",
        "pipeline/storage/pickled_checkpoint.py",
        "        broken = archive.testzip()",
        "        broken = None",
        HOSTILE,
    ),
    Mutation(
        "convert: expanded tensors are accepted",
        "pipeline/storage/pickled_checkpoint.py",
        "    if tensor.nbytes > min(tensor.untyped_storage().nbytes(), max_bytes):",
        "    if tensor.nbytes < 0:",
        nvlabs("a_file_that_cannot_be_used_is_refused_in_one_line"),
    ),
    Mutation(
        "convert: tensors of one storage are accepted",
        "pipeline/inference/releases.py",
        " > 2 * file_size:",
        " > 2**60:",
        nvlabs("a_file_that_cannot_be_used_is_refused_in_one_line"),
    ),
    Mutation(
        "convert: old files halve their groups",
        "pipeline/models/nvae_options.py",
        "ada_groups: bool = False",
        "ada_groups: bool = True",
        nvlabs("a_file_of_an_early_release_has_the_options_of_its_time"),
    ),
    Mutation(
        "convert: second copies are not compared",
        "pipeline/models/nvae_conversion.py",
        "return copy.shape == weight.shape and torch.equal(copy, weight)",
        "return True",
        ("tests/models/test_nvae_conversion.py",),
    ),
    Mutation(
        "convert: unknown tensors are dropped",
        "pipeline/models/weights.py",
        "for name in found if name not in expected]",
        "for name in ()]",
        nvlabs("a_file_that_cannot_be_used_is_refused_in_one_line"),
    ),
    Mutation(
        "convert: the batch is that of one process",
        "pipeline/inference/nvlabs_import.py",
        "options.batch_size * processes",
        "options.batch_size",
        nvlabs("the_recipe_trains_and_measures_as_the_options_say"),
    ),
    Mutation(
        "convert: other operations in the cells",
        "pipeline/inference/nvlabs_import.py",
        "        if found[kind] != expected[kind]:",
        "        if False:",
        nvlabs("a_file_that_cannot_be_used_is_refused_in_one_line"),
    ),
    Mutation(
        "convert: weights in the order of the file",
        "pipeline/inference/nvlabs_export.py",
        "for name in model.state_dict()}",
        "for name in sorted(model.state_dict())}",
        nvlabs("there_and_back_is_the_identity"),
    ),
    Mutation(
        "convert: the optimizer's parameters are shifted",
        "pipeline/inference/nvlabs_export.py",
        "for number, name in enumerate(names, first)",
        "for number, name in enumerate(names, 1)",
        nvlabs("a_run_becomes_a_file_with_the_state_of_its_optimizer"),
    ),
    Mutation(
        "convert: the average in place of the last weights",
        "pipeline/inference/releases.py",
        'return "ema" if weights == "average" else "model"',
        'return "ema"',
        nvlabs("a_run_with_a_moving_average_needs_a_choice"),
    ),
    Mutation(
        "convert: the card states no license",
        "pipeline/inference/releases.py",
        'return RELEASES.get(release or "")',
        "return None",
        ("tests/scripts/test_convert.py",),
    ),
    Mutation(
        "convert: figures of the weights before",
        "pipeline/inference/export_run.py",
        "readjusted_content(described, request.readjust, find_device(request.device)), {}",
        "readjusted_content(described, request.readjust, find_device(request.device)), reports",
        ("tests/scripts/test_convert.py",),
    ),
    Mutation(
        "convert: the picture is of the weights before",
        "pipeline/inference/export_run.py",
        "    temperature = temperature_of(content.facts)",
        "    temperature = 1.0",
        ("tests/scripts/test_convert.py",),
    ),
    Mutation(
        "convert: MNIST without padding",
        "pipeline/models/nvae_options.py",
        "BINARY_BORDER if self.is_binary else 0",
        "0",
        ("tests/scripts/test_convert.py",),
    ),
    Mutation(
        "convert: batch norm sees the same samples again",
        "pipeline/inference/readjust.py",
        "range(iteration * how.batch_size, (iteration + 1) * how.batch_size)",
        "range(how.batch_size)",
        nvlabs("saved_statistics_are_those_of_the_release_s_own_estimate"),
    ),
    Mutation(
        "convert: batch norm for temperature 1",
        "pipeline/inference/readjust.py",
        "how.iterations, how.temperature, placed",
        "how.iterations, 1.0, placed",
        nvlabs("saved_statistics_are_those_of_the_release_s_own_estimate"),
    ),
    Mutation(
        "convert: a file of VDVAE with a prefix is not read",
        "pipeline/inference/openai_vdvae.py",
        "return {name.removeprefix(PREFIX): tensor for name, tensor in saved.items()}",
        "return saved",
        ("tests/inference/test_openai_vdvae.py",),
    ),
    Mutation(
        "convert: posterior and prior of VDVAE are exchanged",
        "pipeline/models/vdvae_conversion.py",
        '("decoder.dec_blocks.{}.enc.", "decoder.blocks.{}.posterior."),',
        '("decoder.dec_blocks.{}.resnet.", "decoder.blocks.{}.posterior."),',
        ("tests/inference/test_openai_vdvae.py",),
    ),
    Mutation(
        "convert: VDVAE's tensors in the order of the checkpoint",
        "pipeline/inference/openai_vdvae.py",
        "for name in meta_state(recipe)}",
        "for name in sorted(meta_state(recipe))}",
        ("tests/inference/test_openai_vdvae.py",),
    ),
    Mutation(
        "convert: VDVAE's pixels are standardized in another way",
        "pipeline/models/vdvae_conversion.py",
        "if all(isclose(one, other, rel_tol=1e-6) for one, other in zip(found, numbers, strict=True)):",
        "if True:",
        ("tests/inference/test_openai_vdvae.py",),
    ),
    Mutation(
        "convert: settings that a release has no option for are lost",
        "pipeline/models/release_network.py",
        "        elif value != other:",
        "        elif False:",
        ("tests/models/test_release_network.py",),
    ),
)
