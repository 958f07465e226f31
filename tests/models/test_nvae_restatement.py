"""Our NVAE equals its restatement in plain functions (nvae_restatement.py), in float64, under shared random weights.

test_restatement_golden.py compares the restatement itself with numbers of the reference release.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.evaluation.sample_grids import readjust_batch_norm
from pipeline.models.nvae import NVAE
from pipeline.models.nvae_conversion import (
    reference_parameter_names,
    state_dict_to_reference,
)
from pipeline.training.objective import Objective, ObjectiveConfig
from pipeline.training.optim import OptimConfig, build_optimizer
from pipeline.training.regularizers import RegularizerConfig, Regularizers
from tests.helpers.golden import close, close_buffers
from tests.helpers.nvae_cases import load_reference, nvae_from_reference
from tests.models import nvae_restatement as restatement
from tests.models import nvae_restatement_layout as layout
from tests.models import nvae_restatement_training as restated_training

BASE = {
    "dataset": "imagenet_16",
    "arch_instance": "res_mbconv",
    "kl_anneal_portion": 0.3,
    "kl_const_portion": 1e-4,
    "kl_const_coeff": 1e-4,
    "weight_decay": 3e-4,
    "weight_decay_norm": 1e-2,
    "weight_decay_norm_init": 10.0,
    "weight_decay_norm_anneal": False,
    "num_nf": 0,
    "num_x_bits": 8,
    "num_latent_scales": 2,
    "num_groups_per_scale": 2,
    "num_latent_per_group": 2,
    "ada_groups": False,
    "min_groups_per_scale": 1,
    "num_channels_enc": 4,
    "num_channels_dec": 4,
    "num_preprocess_blocks": 1,
    "num_preprocess_cells": 2,
    "num_postprocess_blocks": 1,
    "num_postprocess_cells": 2,
    "num_cell_per_cond_enc": 1,
    "num_cell_per_cond_dec": 1,
    "num_mixture_dec": 2,
    "use_se": True,
    "res_dist": True,
}
VARIANTS = {
    "plain": {},
    "one_pair_of_flows": {"num_nf": 1},
    "two_pairs_of_flows": {"num_nf": 2, "num_latent_scales": 1, "num_groups_per_scale": 2},
    "no_squeeze_excitation": {"use_se": False},
    "absolute_posterior": {"res_dist": False},
    "unequal_widths": {"num_channels_enc": 6, "num_channels_dec": 4, "num_nf": 1},
    "three_adaptive_scales": {"num_latent_scales": 3, "num_groups_per_scale": 4, "ada_groups": True},
    "adaptive_with_minimum": {"num_groups_per_scale": 3, "ada_groups": True, "min_groups_per_scale": 2},
    "two_blocks": {"num_preprocess_blocks": 2, "num_postprocess_blocks": 2, "num_preprocess_cells": 1},
    "more_cells": {"num_cell_per_cond_enc": 2, "num_cell_per_cond_dec": 2, "num_postprocess_cells": 3},
    "normal_decoder": {"num_mixture_dec": 1},
    "five_bits": {"num_x_bits": 5, "num_mixture_dec": 10},
    "binary": {"dataset": "mnist", "num_preprocess_blocks": 2, "num_postprocess_blocks": 2},
    "annealed_regularizers": {"weight_decay_norm_anneal": True, "weight_decay_norm_init": 1.0},
    "five_scales": {  # CelebA-HQ and FFHQ at a quarter of their groups and a tenth of their width
        "dataset": "imagenet_32", "num_latent_scales": 5, "num_groups_per_scale": 4, "ada_groups": True, "num_nf": 2,
        "num_x_bits": 5, "num_mixture_dec": 10, "num_channels_enc": 3, "num_channels_dec": 3, "num_latent_per_group": 3,
        "num_cell_per_cond_enc": 2, "num_cell_per_cond_dec": 2, "weight_decay_norm": 1e-1,
        "weight_decay_norm_anneal": True, "weight_decay_norm_init": 1.0,
    },
    "narrow": {"num_channels_enc": 5, "num_channels_dec": 6, "num_latent_per_group": 3},
    **{
        name: {"arch_instance": name, "num_channels_enc": 8, "num_channels_dec": 8, "num_groups_per_scale": 1}
        for name in layout.BRANCHES
        if name != "res_mbconv"
    },
}  # fmt: skip
BATCH, TOTAL_STEPS = 3, 1000


class Pair:
    """The same weights in our model and in the restatement, with images and noise."""

    def __init__(self, args: dict, seed: int = 0):
        self.args, self.state = args, layout.random_state(args, seed)
        generator = torch.Generator().manual_seed(seed + 1)
        levels = torch.randint(256, (BATCH, *layout.image_shape(args)), generator=generator)
        if args["dataset"] in layout.BINARY:
            self.x = (levels > 127).double()
        else:
            self.x = (levels >> 8 - args["num_x_bits"]).double() / (2 ** args["num_x_bits"] - 1)
        self.draws = [
            [
                torch.randn(BATCH, *shape, generator=generator, dtype=torch.float64)
                for shape in layout.latent_shapes(args)
            ]
            for _ in range(3)
        ]
        self.noise = self.draws[0]

    def model(self, training: bool = False) -> NVAE:
        model = nvae_from_reference(self.args).double()
        load_reference(model, self.state)
        return model.train(training)

    def net(self, training: bool = False, state: dict[str, Tensor] | None = None) -> restatement.Net:
        return restatement.Net(self.args, self.state if state is None else state, training)

    def regularizers(self, model: NVAE) -> Regularizers:
        """Ours, after a first commit: with vectors to go on from."""
        annealed = self.args["weight_decay_norm_anneal"]
        strength, initial = self.args["weight_decay_norm"], self.args["weight_decay_norm_init"]
        config = RegularizerConfig(strength=strength, initial_strength=initial if annealed else None)
        regularizers = Regularizers(config, model, seed=5)
        regularizers(0.5)
        regularizers.commit()
        return regularizers

    def vectors(self, regularizers: Regularizers) -> dict[str, Tensor]:
        """Ours by the reference's names of convolutions."""
        stacks = regularizers.state()
        matrices = restated_training.conv_matrices(self.state)
        assert list(stacks) == [f"{rows}x{columns}" for rows, columns in matrices]
        pairs = zip(stacks.values(), matrices.values(), strict=True)
        return {name: u for stack, names in pairs for u, name in zip(stack, names, strict=True)}


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request) -> Pair:
    return Pair(BASE | VARIANTS[request.param])


def test_same_names_shapes_and_order(pair):
    model = nvae_from_reference(pair.args)
    exported = state_dict_to_reference(model.state_dict())
    assert {name: tuple(tensor.shape) for name, tensor in exported.items()} == layout.parameter_shapes(pair.args)
    assert list(exported) == list(pair.state)
    assert reference_parameter_names(model) == layout.parameter_order(pair.args)
    assert [group.shape for group in model.groups] == layout.latent_shapes(pair.args)


@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_same_forward(pair, training):
    model, net = pair.model(training), pair.net(training)
    out, expected = model(pair.x, pair.noise), restatement.forward(net, pair.x, pair.noise)
    close(-out.log_px, expected["recon"], what="recon")
    close(out.kl.T, expected["kl_all"], what="KL")
    close(torch.stack(out.kl_units), expected["kl_diag"], what="KL per unit")
    close(out.log_qz, expected["log_q"], what="log q")
    close(out.log_pz, expected["log_p"], what="log p")
    close_buffers(state_dict_to_reference(model.state_dict()), net.running)
    close(pair.model(training).infer(pair.x, pair.noise)[0], expected["logits"], what="logits")
    if not training:
        close(model.reconstruct(pair.x, pair.noise), restatement.decoder_mean(pair.args, expected["logits"]))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@torch.no_grad()
def test_same_samples(pair, temperature):
    model, net = pair.model(), pair.net()
    logits = restatement.sample_logits(net, pair.noise, temperature)
    close(model.generate(pair.noise, temperature)[0], logits)
    close(model.sample(pair.noise, temperature), restatement.decoder_mean(pair.args, logits))


@torch.no_grad()
def test_same_samples_with_the_first_groups_given_and_a_temperature_for_each(pair):
    model, net = pair.model(), pair.net()
    temperatures = [1 / (1 + k) for k in range(len(model.groups))]
    latents = model.encode(pair.x, pair.noise)
    for count in range(len(latents) + 1):
        logits = restatement.sample_logits(net, pair.noise, temperatures, latents[:count])
        found = model.sample(pair.noise, temperatures, given=latents[:count])
        close(found, restatement.decoder_mean(pair.args, logits), what=f"{count} groups given")


@torch.no_grad()
def test_same_batch_norm_reestimation(pair):
    model, net = pair.model(), pair.net(training=True)
    readjust_batch_norm(model, lambda i: pair.draws[i], len(pair.draws), 0.7)
    for noise in pair.draws:
        restatement.sample_logits(net, noise, 0.7)
    close_buffers(state_dict_to_reference(model.state_dict()), net.running)


def test_same_training(pair):
    """Two optimizer steps, in and after the KL warm-up: losses, first gradients, parameters, singular vectors."""
    model = pair.model(training=True)
    regularizers, objective = pair.regularizers(model), Objective(ObjectiveConfig(), model.groups, TOTAL_STEPS)
    optimizer = build_optimizer(model, OptimConfig(lr=2e-3))
    names = layout.parameter_order(pair.args)
    net = pair.net(True, restated_training.with_gradient(pair.args, pair.state))
    u, slots = pair.vectors(regularizers), {name: (torch.zeros_like(net.state[name]),) * 2 for name in names}
    for t, (step, noise) in enumerate(zip((150, 301), pair.draws[:2], strict=True), start=1):
        loss, _ = objective(model(pair.x, noise), step)
        penalty, _ = regularizers(objective.warmup(step))
        expected = restated_training.training_loss(net, pair.x, noise, step, TOTAL_STEPS, u)
        close(loss, (expected["recon"] + expected["balanced_kl"]).mean(), what=f"loss at step {step}")
        close(penalty, expected["total"] - (expected["recon"] + expected["balanced_kl"]).mean(), rtol=1e-8)
        close(loss + penalty, expected["total"], what=f"total at step {step}")
        optimizer.zero_grad(set_to_none=True)
        (loss + penalty).backward()
        optimizer.step()
        regularizers.commit()
        expected_gradients = restated_training.gradients(net, expected["total"])
        if t == 1:
            close_gradients(model, expected_gradients)
        u = expected["u"]
        net = pair.net(True, adamax(pair, net.state, expected_gradients, slots, t))
        for name, vectors in pair.vectors(regularizers).items():
            close(vectors, u[name], what=name)
        for name, parameter in zip(names, model.parameters(), strict=True):
            close(
                parameter, net.state[name], rtol=1e-7, what=name
            )  # rounding noise of zero gradients is amplified by lr / eps


def close_gradients(model: NVAE, expected: dict[str, Tensor]) -> None:
    largest = max(grad.norm().item() for grad in expected.values())
    for (name, grad), parameter in zip(expected.items(), model.parameters(), strict=True):
        torch.testing.assert_close(
            parameter.grad, grad, rtol=1e-9, atol=1e-11 * largest, msg=lambda t, n=name: f"{n}: {t}"
        )


def adamax(
    pair: Pair, state: dict[str, Tensor], gradients: dict[str, Tensor], slots: dict, t: int
) -> dict[str, Tensor]:
    """The restatement's weights after one update; `slots` are moved on in place."""
    state = {name: tensor.detach() for name, tensor in state.items()}
    for name, gradient in gradients.items():
        state[name], *slots[name] = restated_training.adamax_step(
            state[name], gradient, *slots[name], t, lr=2e-3, wd=pair.args["weight_decay"]
        )
    return restated_training.with_gradient(pair.args, state)


def any_options() -> st.SearchStrategy:
    """Options of small models; scales and blocks divide a 16-pixel image."""
    count, flag, widths = st.integers(1, 2), st.booleans(), st.integers(4, 9)
    blocks = st.shared(count, key="blocks")
    return st.fixed_dictionaries(
        {
            "arch_instance": st.sampled_from(["res_mbconv", "res_bnswish", "mbconv_sep", "res35_mbconv"]),
            "dataset": st.sampled_from(["mnist", "imagenet_16"]),
            "num_nf": st.integers(0, 2),
            "num_x_bits": st.integers(3, 8),
            "num_latent_scales": st.integers(1, 3),
            "num_groups_per_scale": st.integers(2, 3),
            "num_latent_per_group": st.integers(1, 3),
            "ada_groups": flag,
            "min_groups_per_scale": count,
            "num_channels_enc": widths,
            "num_channels_dec": widths,
            "num_preprocess_blocks": blocks,
            "num_postprocess_blocks": blocks,
            "num_preprocess_cells": count,
            "num_postprocess_cells": count,
            "num_cell_per_cond_enc": count,
            "num_cell_per_cond_dec": count,
            "num_mixture_dec": st.integers(1, 3),
            "use_se": flag,
            "res_dist": flag,
        }
    )


@given(any_options(), st.integers(0, 99), st.booleans())
@settings(max_examples=20, deadline=None, derandomize=True)
@torch.no_grad()
def test_same_forward_for_any_options(options, seed, training):
    pair = Pair(BASE | options, seed)
    out = pair.model(training)(pair.x, pair.noise)
    expected = restatement.forward(pair.net(training), pair.x, pair.noise)
    close(-out.elbo, expected["nelbo"])
    close(out.log_px + out.log_pz - out.log_qz, expected["log_iw"])
    close(out.kl.T, expected["kl_all"])


def test_vanilla_mode():
    """A single latent group has no towers; the reference's unused `prior_ftr0` is left out."""
    pair = Pair(BASE | {"num_latent_scales": 1, "num_groups_per_scale": 1})
    model, net = pair.model(), pair.net()
    assert "prior_ftr0" not in reference_parameter_names(model)
    with torch.no_grad():
        out, expected = model(pair.x, pair.noise), restatement.forward(net, pair.x, pair.noise)
        close(-out.log_px, expected["recon"])
        close(out.kl.T, expected["kl_all"])
        close(model.generate(pair.noise, 0.7)[0], restatement.sample_logits(net, pair.noise, 0.7))


@pytest.mark.parametrize("seed", [1, 2, 3])
@torch.no_grad()
def test_mixture_samples(seed):
    """Pixels drawn from shared uniforms, for random mixtures."""
    generator = torch.Generator().manual_seed(seed)
    model = nvae_from_reference(BASE | {"num_mixture_dec": 3})
    logits = torch.randn(2, 30, 8, 8, generator=generator, dtype=torch.float64)
    u_mix = torch.rand(2, 3, 8, 8, generator=generator, dtype=torch.float64).clamp(1e-5, 1 - 1e-5)
    u_logistic = torch.rand(2, 3, 8, 8, generator=generator, dtype=torch.float64).clamp(1e-5, 1 - 1e-5)
    for t in (1.0, 0.7):
        drawn = model.likelihood(logits).sample(u_mix, u_logistic, t)
        close(drawn, restatement.mixture_sample(logits, u_mix, u_logistic, t))
