"""The building blocks against the unit vectors (units.pt) of the NVAE reference release, in float64."""

import pytest
import torch
from torch import nn

from pipeline.data.preprocess import to_model_input
from pipeline.models.base import LatentGroup, VAEOutput
from pipeline.models.nvae_conversion import state_dict_from_reference
from pipeline.models.nvae_options import ReleaseOptions
from pipeline.nn.cells import CELLS, BNELUConv, BNSwishConv, FactorizedReduce, InvertedResidual, ResidualCell
from pipeline.nn.distributions import ClampedNormal, DiscretizedLogisticMixture, PixelNormal
from pipeline.nn.flows import FlowPair
from pipeline.nn.layers import SqueezeExcitation, WNConv2d, causal_mask
from pipeline.training.objective import Objective, ObjectiveConfig, balancing_weights, kl_warmup, resolution_factors
from pipeline.training.optim import LearningRate, OptimConfig, build_optimizer
from pipeline.training.regularizers import RegularizerConfig, Regularizers
from tests.helpers import golden
from tests.helpers.golden import close

MODULES = 21


@pytest.fixture(scope="module")
def units() -> dict:
    if golden.golden_folder() is None:
        pytest.skip("NVAE_GOLDEN_DIR is not set")
    return golden.load(golden.golden_folder() / "units.pt")


def test_every_entry_has_a_test(units):
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert units.keys() - {"format"} <= tested
    assert len(units["modules"]) == MODULES


# ---- distributions and data


def test_normal(units):
    entry = units["normal"]
    prior = ClampedNormal(entry["p_raw"]["mu_raw"], entry["p_raw"]["log_sigma_raw"])
    for row in entry["rows"]:
        posterior = ClampedNormal(entry["q_raw"]["mu_raw"], entry["q_raw"]["log_sigma_raw"], row["temp_q"])
        close(posterior.mean, row["q_mu"])
        close(posterior.sigma, row["q_sigma"])
        close(posterior.log_prob(entry["z"]), row["log_q"])
        close(posterior.kl(prior), row["kl_qp"])


def test_dmol(units):
    for entry in units["dmol"]:
        bits = entry["num_bits"]
        mixture = DiscretizedLogisticMixture(entry["logits"], bits)
        close(mixture.log_prob(entry["levels"].double() / (2**bits - 1)), entry["log_prob"], what=f"{bits} bits")
        close(mixture.mean, entry["mean"])


def test_dmol_all_levels(units):
    entry = units["dmol_all_levels"]
    mixture = DiscretizedLogisticMixture(entry["logits"], entry["num_bits"])
    close(mixture.log_prob(entry["levels"].double() / 255), entry["log_prob"])


def test_normal_decoder(units):
    entry = units["normal_decoder"]
    close(PixelNormal(ClampedNormal(*entry["logits"].chunk(2, dim=1))).log_prob(entry["x"]), entry["log_prob"])


def test_quantise(units):
    images = torch.arange(256, dtype=torch.uint8)
    for bits, expected in units["quantise"].items():
        assert torch.equal(to_model_input(images, int(bits), torch.float32), expected["f32"])
        close(to_model_input(images, int(bits), torch.float64), expected["f64"])
        assert not expected["level_f32_minus_shift"].any()  # to_model_input shifts; the reference divides and floors


# ---- structure

ARGS = {
    "dataset": "cifar10",
    "arch_instance": "res_mbconv",
    "num_latent_per_group": 2,
    "num_channels_enc": 4,
    "num_channels_dec": 4,
    "num_preprocess_blocks": 1,
    "num_postprocess_blocks": 1,
    "num_preprocess_cells": 1,
    "num_postprocess_cells": 1,
    "num_cell_per_cond_enc": 1,
    "num_cell_per_cond_dec": 1,
    "num_nf": 0,
    "num_x_bits": 8,
    "num_mixture_dec": 1,
    "use_se": True,
    "res_dist": True,
}


def test_groups_per_scale(units):
    for row in units["groups_per_scale"]:
        groups = {
            "num_latent_scales": row["scales"],
            "num_groups_per_scale": row["n"],
            "ada_groups": row["ada"],
            "min_groups_per_scale": row["min"],
        }
        assert list(ReleaseOptions(**ARGS | groups).groups_per_scale)[::-1] == row["out"]


def test_ar_masks(units):
    for row in units["ar_masks"]:
        mask = causal_mask(row["c_in"], row["c_out"], row["k"], row["zero_diag"], row["mirror"], row["groups"])
        assert torch.equal(mask, row["mask"]), row


def cell(kind: str, role: str, squeeze_excitation: bool) -> ResidualCell:
    resize = {"normal": "same"}.get(kind, kind)
    ours = {"enc": "encoder", "dec": "decoder", "pre": "preprocess", "post": "postprocess"}[role]
    return ResidualCell(6, resize, CELLS["res_mbconv"][ours], squeeze_excitation)


def build_module(name: str) -> tuple[nn.Module, str, str]:
    """Our module for an entry of `modules`, and the prefixes of its keys in a model: the reference's, and ours."""
    if " se=" in name:
        kind, role, se = name.replace(" se=", "_").split("_")
        return cell(kind, role, se == "True"), "pre_process.0.", "preprocess.0."
    builders = {
        "factorized_reduce 5->10, 8x10": (FactorizedReduce(5, 10), "skip.", "skip."),
        "se 40": (SqueezeExcitation(40), "se.", "se."),
        "se 96": (SqueezeExcitation(96), "se.", "se."),
        "res_bnswish5": (BNSwishConv(6, 6, "same", dilation=2), "_ops.0.", "branch.0."),
        "mconv_e3k5g8": (InvertedResidual(8, 8, "same", 3, kernel=5, group_width=3), "_ops.0.", "branch.0."),
        "mconv_e6k11g0": (InvertedResidual(4, 4, "same", 6, kernel=11), "_ops.0.", "branch.0."),
        "res_bnelu up": (BNELUConv(6, 3, "up"), "_ops.0.", "branch.0."),
    }
    if name in builders:
        module, theirs, ours = builders[name]
        return module, f"pre_process.0.{theirs}", f"preprocess.0.{ours}"
    if name == "paired_ar":
        return FlowPair(3), "nf_cells.0.", "flows.0.0."
    assert name == "conv2d wn", f"no module of ours is known for {name!r}"
    return WNConv2d(5, 7, 3, padding=1), "stem.", "stem."


@pytest.mark.parametrize("index", range(MODULES))
@torch.no_grad()
def test_modules(units, index):
    entry = units["modules"][index]
    module, theirs, ours = build_module(entry["name"])

    def in_our_names(state: dict) -> dict:
        expected = {ours + key: tensor for key, tensor in module.state_dict().items()}
        imported = state_dict_from_reference(golden.double({theirs + key: state[key] for key in state}), expected)
        return {key.removeprefix(ours): tensor for key, tensor in imported.items()}

    module.double()
    module.load_state_dict(in_our_names(entry["state_dict"]))
    x = entry["inputs"][0]
    if entry["name"] == "paired_ar":  # takes a feature, which it does not use; gives z and a log-determinant of zero
        expected, log_det = entry["eval"]
        close(module(x), expected)
        assert not log_det.any()
        return
    for mode in ("eval", "train"):
        y = module.train(mode == "train")(x)
        y = x * y if isinstance(module, SqueezeExcitation) else y  # ours gives the gate
        close(y, entry[mode], what=f"{entry['name']} in {mode} mode")
    for key, tensor in in_our_names(entry["state_dict"] | entry["after"]).items():
        if "running" in key:
            close(module.state_dict()[key], tensor, what=key)


# ---- objective and optimizer


def groups_of(high_to_low: list[int]) -> list[LatentGroup]:
    """Latent groups in drawing order, of resolutions 2, 4, 8, ..."""
    counts = high_to_low[::-1]
    return [LatentGroup(f"{i}/{n}", (3, 2 << i, 2 << i)) for i, count in enumerate(counts) for n in range(count)]


def test_kl_balance(units):
    for entry in units["kl_balance"]:
        groups, kl = groups_of(entry["groups_high_to_low_res"]), entry["kl_all"].T  # (B, G)
        for rule, alpha in entry["alpha"].items():
            close(resolution_factors(groups, rule), alpha, rtol=1e-6)  # the table was computed in float32
        weights = balancing_weights(kl.abs().mean(dim=0), entry["alpha"]["square"])
        for row in entry["rows"]:
            beta = row["kl_coeff"]
            expected = weights if beta < 1 else torch.ones_like(weights)
            close(expected, row["coeffs"])
            close(beta * kl @ expected, row["balanced"])
            objective = Objective(ObjectiveConfig(kl_warmup_floor=beta), groups, total_steps=1000)
            close(objective.charged_kl(kl, step=0), row["balanced"], rtol=1e-6)
            zeros = kl.new_zeros(len(kl))
            out = VAEOutput(zeros, kl, zeros, zeros, tuple(kl.new_zeros(3) for _ in groups))
            _, statistics = objective(out, step=0)
            close(torch.stack([statistics[f"kl/{group.name}"] for group in groups]), row["means"])


def test_kl_coeff(units):
    entry = units["kl_coeff"]
    found = [kl_warmup(step, entry["total"], ObjectiveConfig()) for step in entry["steps"]]
    close(found, entry["value"])


def test_wdn_anneal(units):
    entry = units["wdn_anneal"]
    config = RegularizerConfig(strength=entry["final"], initial_strength=entry["init"])
    regularizers = Regularizers(config, nn.Conv2d(1, 1, 1), seed=0)
    close([regularizers.strength(beta) for beta in entry["kl_coeff"]], entry["value"])


def test_lr_schedule(units):
    entry = units["lr_schedule"]
    config = OptimConfig(
        lr=entry["lr"], lr_min=entry["lr_min"], schedule="cosine_per_epoch", warmup_epochs=entry["warmup_epochs"]
    )
    total_steps = entry["epochs"] * entry["iters_per_epoch"]
    learning_rate = LearningRate(config, total_steps, entry["iters_per_epoch"])
    assert len(entry["per_iter"]) == total_steps
    close([learning_rate(step) for step in range(total_steps)], entry["per_iter"])


def test_adamax(units):
    entry = units["adamax"]
    model = nn.ParameterList(nn.Parameter(tensor.clone()) for tensor in entry["init"])
    config = OptimConfig(
        beta1=entry["betas"][0], beta2=entry["betas"][1], eps=entry["eps"], weight_decay=entry["weight_decay"]
    )
    optimizer = build_optimizer(model, config)
    for row in entry["steps"]:
        for parameter, grad in zip(model, row["grads"], strict=True):
            parameter.grad = grad.clone()
        optimizer.param_groups[0]["lr"] = row["lr"]
        optimizer.step()
        state = [optimizer.state[parameter] for parameter in model]
        for i in range(len(model)):
            close(model[i], row["params"][i], rtol=1e-13)
            close(state[i]["exp_avg"], row["exp_avg"][i], rtol=1e-13)
            close(state[i]["exp_inf"], row["exp_inf"][i], rtol=1e-13)
