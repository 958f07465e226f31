"""Mistakes in VDVAE: most are rules that its paper does not state, or states otherwise."""

from tests.mutations.mutation import Mutation

PARTS, OPTIONS = "pipeline/models/vdvae_parts.py", "pipeline/models/vdvae_options.py"
TOP_DOWN = "pipeline/models/top_down.py"
DISTRIBUTIONS = "pipeline/nn/distributions.py"
RESTATEMENT = ("tests/models/test_vdvae_restatement.py",)
REFUSED = ("tests/models/test_vdvae_options.py",)
RULES = ("tests/nn/test_distributions.py",)
EFFICIENT_PARTS, NORMALS = "pipeline/models/efficient_vdvae_parts.py", "pipeline/nn/latent_normals.py"
EFFICIENT = ("tests/models/test_efficient_vdvae_restatement.py",)

MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        "VDVAE with the tanh approximation of GELU",
        "pipeline/nn/bottleneck.py",
        "h = conv(self.activation(h))",
        'h = conv(F.gelu(h, approximate="tanh"))',
        RESTATEMENT,
    ),
    Mutation(
        "VDVAE with 3x3 convolutions on maps of 2x2",
        PARTS,
        "3 if resolution > 2 else 1",
        "3 if resolution > 1 else 1",
        RESTATEMENT,
    ),
    Mutation(
        "VDVAE with the posterior's inner width from its input",
        PARTS,
        "inner, kernel = int(width * bottleneck)",
        "inner, kernel = int(outer[0] * bottleneck)",
        RESTATEMENT,
    ),
    Mutation(
        "VDVAE with rounded inner widths",
        PARTS,
        "inner, kernel = int(width * bottleneck)",
        "inner, kernel = round(width * bottleneck)",
        RESTATEMENT,
    ),
    Mutation(
        "VDVAE's posterior sees what the prior adds",
        TOP_DOWN,
        "self.posterior(torch.cat([h, feature], dim=1))",
        "self.posterior(torch.cat([state, feature], dim=1))",
        RESTATEMENT,
    ),
    Mutation(
        "VDVAE's first channels are mixed in, whatever the resolution's width",
        PARTS,
        "lower = states[mixed][:, : self.widths[resolution]]",
        "lower = states[mixed][:, -self.widths[resolution] :]",
        RESTATEMENT,
    ),
    Mutation(
        "VDVAE without its output's gain",
        PARTS,
        "self.output(states[self.size] * self.gain + self.bias)",
        "self.output(states[self.size] + self.bias + 0 * self.gain)",
        RESTATEMENT,
    ),
    Mutation(
        "VDVAE's encoder is scaled by the number of decoder blocks at the beginning",
        PARTS,
        "1 / sqrt(len(options.encoder))",
        "1 / sqrt(len(options.decoder))",
        RESTATEMENT,
    ),
    Mutation(
        "VDVAE's priors start away from N(0, 1)",
        PARTS,
        "nn.init.zeros_(self.prior.convs[-1].weight)",
        "nn.init.zeros_(self.prior.convs[-1].bias)",
        RESTATEMENT,
    ),
    Mutation(
        "VDVAE's biases are random at the beginning",
        "pipeline/nn/bottleneck.py",
        "nn.init.zeros_(conv.bias)",
        "assert conv.bias is not None",
        RESTATEMENT,
    ),
    Mutation(
        "VDVAE's temperature of the first block is that of all",
        TOP_DOWN,
        "sample(temperatures[k] * noise[k])",
        "sample(temperatures[0] * noise[k])",
        RESTATEMENT,
    ),
    Mutation(
        "VDVAE's condition changes the start of the last block",
        PARTS,
        "if k == 0 and offset is not None:",
        "if k == len(self.plan) - 1 and offset is not None:",
        RESTATEMENT,
    ),
    Mutation(
        "VDVAE accepts decoder blocks that nothing uses",
        OPTIONS,
        "for resolution in sorted(unused - {options.size}):",
        "for resolution in ():",
        REFUSED,
    ),
    Mutation(
        "VDVAE accepts encoder blocks that nothing uses",
        OPTIONS,
        "if resolutions[-1] not in done:",
        "if not done:",
        REFUSED,
    ),
    Mutation(
        "the rule of VDVAE has the edge of NVAE's",
        DISTRIBUTIONS,
        '"vdvae": 0.999,',
        '"vdvae": 0.99,',
        RULES,
    ),
    Mutation(
        "VDVAE's 5-bit levels get bins that fit",
        DISTRIBUTIONS,
        "x = torch.floor(torch.round(255 * x) / 8) * (8 / 255)",
        "x = torch.floor(torch.round(255 * x) / 8) / 31",
        RULES,
    ),
    Mutation(
        "Efficient VDVAE adds the half of the prior's output that makes its parameters",
        EFFICIENT_PARTS,
        "extra, parameters = self.prior(h)",
        "parameters, extra = self.prior(h)",
        EFFICIENT,
    ),
    Mutation(
        "Efficient VDVAE upsamples without its learned map",
        EFFICIENT_PARTS,
        'mode="nearest") + self.map',
        'mode="nearest") + 0 * self.map',
        EFFICIENT,
    ),
    Mutation(
        "Efficient VDVAE pools without an activation",
        EFFICIENT_PARTS,
        "h = F.leaky_relu(level.pool(h), SLOPE)",
        "h = level.pool(h)",
        EFFICIENT,
    ),
    Mutation(
        "Efficient VDVAE's residual posterior ignores the prior's sigma",
        NORMALS,
        "sigma = softplus(prior_scale, self.beta) * softplus(scale, self.beta)",
        "sigma = softplus(scale, self.beta)",
        EFFICIENT,
    ),
    Mutation(
        "Efficient VDVAE's logarithms of sigma without beta",
        NORMALS,
        "scale if self.beta == 1 else self.beta * scale",
        "scale",
        EFFICIENT,
    ),
    Mutation(
        "Efficient VDVAE's smallest scale after beta",
        DISTRIBUTIONS,
        "return clamped if self.beta == 1 else self.beta * clamped",
        "return (self.beta * raw).clamp(min=self.minimum)",
        EFFICIENT,
    ),
    Mutation(
        "Efficient VDVAE's largest level at 5 bits has no upper tail",
        DISTRIBUTIONS,
        "HIGHEST_OF_5_BITS - 1e-3",
        "0.999",
        EFFICIENT,
    ),
    Mutation(
        "Efficient VDVAE samples levels above its largest",
        DISTRIBUTIONS,
        "red = values[..., 0].clamp(-1, self.highest)",
        "red = values[..., 0].clamp(-1, 1)",
        EFFICIENT,
    ),
    Mutation(
        "weights by KL as in VDVAE's successor end with the warm-up",
        "pipeline/training/objective.py",
        "within = self.warmup(step) < 1 if portion is None else step < portion * self.total_steps",
        "within = self.warmup(step) < 1",
        ("tests/training/test_objective.py",),
    ),
    Mutation(
        "weights by KL as in VDVAE's successor have NVAE's floor",
        "pipeline/training/objective.py",
        "floor = 0.0 if self.config.kl_balancing in BY_KL_ALONE else INACTIVE_KL",
        "floor = INACTIVE_KL",
        ("tests/training/test_objective.py",),
    ),
)
