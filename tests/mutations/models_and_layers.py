"""Mistakes in pipeline/models and pipeline/nn."""

from tests.mutations.mutation import Mutation

MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        "the temperature of the first group is that of all",
        "pipeline/models/nvae.py",
        "condition), temperatures[k])",
        "condition), temperatures[0])",
        ("tests/models/test_nvae_restatement.py",),
    ),
    Mutation(
        "images and their edits are decoded in two passes, so by two batches' statistics",
        "pipeline/models/attribute_vae.py",
        "self._decode(torch.cat([z, z]), torch.cat([condition, changed])).chunk(2)",
        "(self._decode(z, condition), self._decode(z, changed))",
        ("tests/models/test_attribute_vae.py",),
    ),
    Mutation(
        "latents that are given are not used",
        "pipeline/models/vector_vae.py",
        "latents = list(given) or [noise[0] * scale]",
        "latents = [noise[0] * scale]",
        ("tests/models/test_models.py",),
    ),
    Mutation(
        "the noise of latents without the prior's sigma",
        "pipeline/models/nvae.py",
        "noise.append((latents[k] - prior.mean) / prior.sigma)",
        "noise.append(latents[k] - prior.mean)",
        ("tests/models/test_models.py",),
    ),
    Mutation(
        "shapes are not compared",
        "pipeline/models/weights.py",
        "if found.shape != expected.shape:",
        "if False:",
        ("tests/training/test_state.py",),
    ),
    Mutation(
        "non-finite weights are loaded",
        "pipeline/models/weights.py",
        "if not bool(torch.isfinite(found).all()):",
        "if False:",
        ("tests/training/test_state.py",),
    ),
    Mutation(
        "gradients of batch norm by the moments of this rank alone",
        "pipeline/nn/global_batch_norm.py",
        "dy_mean, covariance = collectives.all_reduce(sums) / counts.sum()",
        "dy_mean, covariance = sums / counts.sum()",
        ("tests/nn/test_batch_norm.py",),
    ),
    Mutation(
        "on GPUs, gradients of batch norm by the moments of this rank alone",
        "pipeline/nn/global_batch_norm.py",
        "collectives.all_reduce(torch.cat(sums)).chunk(2)",
        "torch.cat(sums).chunk(2)",
        ("tests/nn/test_batch_norm.py",),
    ),
    Mutation(
        "on GPUs, the running variance of an upsampled input by its own pixels",
        "pipeline/nn/global_batch_norm.py",
        "weights = counts * copies if copies > 1 else counts",
        "weights = counts",
        ("tests/nn/test_batch_norm.py",),
    ),
)
