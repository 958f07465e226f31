"""The baselines restated in plain torch, for test_baselines.py. `pipeline` is not used.

Written from the table in docs/models.md with nn.Linear, nn.Conv2d and torch.nn.functional. `loss(x, eps, c)` is summed
over the batch. What the table leaves open is as in the tutorials: mu and log sigma^2 are one linear layer each,
z = mu + exp(log sigma^2 / 2) eps, there is no activation between the decoder's linear layer and its first transposed
convolution, LeakyReLU has torch's slope, convolutions before a batch norm have no bias, and a residual block is that of
He et al. (2016, figure 2) with a 1x1 convolution where shapes change.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def cross_entropy(raw: Tensor, x: Tensor) -> Tensor:
    return F.binary_cross_entropy(torch.sigmoid(raw), x, reduction="sum")


def squared_sigmoid(raw: Tensor, x: Tensor) -> Tensor:
    return F.mse_loss(torch.sigmoid(raw), x, reduction="sum")


def squared_tanh(raw: Tensor, x: Tensor) -> Tensor:
    return F.mse_loss(torch.tanh(raw), 2 * x - 1, reduction="sum")


class Tutorial(nn.Module):
    """The loss of a model with methods `encode` and `decode`."""

    beta = 1.0
    reconstruction = staticmethod(cross_entropy)

    def heads(self, features: int, latent: int, flow: nn.Module | None = None) -> None:
        self.mu, self.logvar, self.flow = nn.Linear(features, latent), nn.Linear(features, latent), flow

    def loss(self, x: Tensor, eps: Tensor, c: Tensor | None = None) -> Tensor:
        h = self.encode(x, c)
        mu, logvar = self.mu(h), self.logvar(h)
        z = mu + torch.exp(0.5 * logvar) * eps
        kl = -0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).sum()
        if self.flow is not None:
            log_q = torch.distributions.Normal(mu, torch.exp(0.5 * logvar)).log_prob(z).sum()
            z, log_det = self.flow(z, h)
            kl = log_q - log_det - torch.distributions.Normal(0.0, 1.0).log_prob(z).sum()
        return self.reconstruction(self.decode(z, c), x) + self.beta * kl


def with_condition(values: Tensor, c: Tensor | None) -> Tensor:
    return values if c is None else torch.cat((values, c), dim=1)


class MLP(Tutorial):
    """pixels (+ K) - hidden - (latent, latent), latent (+ K) - hidden - pixels."""

    def __init__(self, shape, hidden, latent, classes=0, flow=None):
        super().__init__()
        self.shape = shape
        pixels = shape[0] * shape[1] * shape[2]
        self.fc1 = nn.Linear(pixels + classes, hidden)
        self.heads(hidden, latent, flow)
        self.fc3 = nn.Linear(latent + classes, hidden)
        self.fc4 = nn.Linear(hidden, pixels)

    def encode(self, x, c):
        return torch.relu(self.fc1(with_condition(x.reshape(len(x), -1), c)))

    def decode(self, z, c):
        return self.fc4(torch.relu(self.fc3(with_condition(z, c)))).reshape(len(z), *self.shape)


class Conv(Tutorial):
    """conv k4 s2 p1: 3-32-64-128; linear; transposed conv k4 s2 p1: 128-64-32-3."""

    def __init__(self, shape, width, latent, classes=0, reconstruction=squared_sigmoid, norm=False, leaky=False):
        super().__init__()
        self.reconstruction = reconstruction
        self.act = F.leaky_relu if leaky else F.relu
        self.top = (4 * width, shape[1] // 8, shape[2] // 8)
        features = self.top[0] * self.top[1] * self.top[2]
        self.conv1 = nn.Conv2d(shape[0], width, 4, 2, 1, bias=not norm)
        self.conv2 = nn.Conv2d(width, 2 * width, 4, 2, 1, bias=not norm)
        self.conv3 = nn.Conv2d(2 * width, 4 * width, 4, 2, 1, bias=not norm)
        self.heads(features + classes, latent)
        self.fc = nn.Linear(latent + classes, features)
        self.deconv1 = nn.ConvTranspose2d(4 * width, 2 * width, 4, 2, 1, bias=not norm)
        self.deconv2 = nn.ConvTranspose2d(2 * width, width, 4, 2, 1, bias=not norm)
        self.deconv3 = nn.ConvTranspose2d(width, shape[0], 4, 2, 1)
        widths = (width, 2 * width, 4 * width, 2 * width, width)
        norms = (nn.BatchNorm2d(w) if norm else nn.Identity() for w in widths)
        self.bn1, self.bn2, self.bn3, self.bn4, self.bn5 = norms

    def encode(self, x, c):
        h = self.act(self.bn1(self.conv1(x)))
        h = self.act(self.bn2(self.conv2(h)))
        h = self.act(self.bn3(self.conv3(h)))
        return with_condition(h.reshape(len(x), -1), c)

    def decode(self, z, c):
        h = self.fc(with_condition(z, c)).reshape(len(z), *self.top)
        h = self.act(self.bn4(self.deconv1(h)))
        h = self.act(self.bn5(self.deconv2(h)))
        return self.deconv3(h)


class SpectralConv(nn.Module):
    """Convolution by W / sigma, where sigma is the exact largest singular value of W as a matrix (C_out, rest)."""

    def __init__(self, inner, outer, kernel, stride=1, bias=False):
        super().__init__()
        plain = nn.Conv2d(inner, outer, kernel, bias=bias)
        self.weight, self.bias = plain.weight, plain.bias
        self.stride, self.padding = stride, (kernel - 1) // 2

    def forward(self, x):
        sigma = torch.linalg.matrix_norm(self.weight.reshape(len(self.weight), -1), 2)
        return F.conv2d(x, self.weight / sigma, self.bias, self.stride, self.padding)


class Block(nn.Module):
    def __init__(self, inner, outer, stride=1, up=False):
        super().__init__()
        self.up = up
        self.conv1, self.bn1 = SpectralConv(inner, outer, 3, stride), nn.BatchNorm2d(outer)
        self.conv2, self.bn2 = SpectralConv(outer, outer, 3), nn.BatchNorm2d(outer)
        self.conv0, self.bn0 = None, None
        if inner != outer or stride != 1:
            self.conv0, self.bn0 = SpectralConv(inner, outer, 1, stride), nn.BatchNorm2d(outer)

    def forward(self, x):
        if self.up:
            x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        skip = x if self.conv0 is None else self.bn0(self.conv0(x))
        return F.relu(skip + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class ResNet(Tutorial):
    """stem; stages of two blocks at stride 2; linear; the mirror of the stages with nearest upsampling."""

    beta = 0.1
    reconstruction = staticmethod(squared_tanh)

    def __init__(self, shape, stem, stages, latent, classes=0):
        super().__init__()
        widths = (stem, *stages)
        factor = 2 ** len(stages)
        self.top = (stages[-1], shape[1] // factor, shape[2] // factor)
        features = self.top[0] * self.top[1] * self.top[2]
        self.stem, self.stem_bn = SpectralConv(shape[0], stem, 3), nn.BatchNorm2d(stem)
        pairs = list(zip(widths[:-1], widths[1:], strict=True))
        self.down = nn.Sequential(*(b for i, o in pairs for b in (Block(i, o, stride=2), Block(o, o))))
        self.heads(features + classes, latent)
        self.fc = nn.Linear(latent + classes, features)
        self.upward = nn.Sequential(*(b for i, o in pairs[::-1] for b in (Block(o, o), Block(o, i, up=True))))
        self.last = SpectralConv(stem, shape[0], 3, bias=True)

    def encode(self, x, c):
        h = self.down(F.relu(self.stem_bn(self.stem(2 * x - 1))))
        return with_condition(h.reshape(len(x), -1), c)

    def decode(self, z, c):
        return self.last(self.upward(self.fc(with_condition(z, c)).reshape(len(z), *self.top)))


class Planar(nn.Module):
    """Rezende & Mohamed 2015, eq. 10-12 and appendix A.1, one image at a time; parameters u, w, b from the features."""

    def __init__(self, latent, features, length):
        super().__init__()
        self.steps = nn.ModuleList(nn.Linear(features, 2 * latent + 1) for _ in range(length))

    def forward(self, z, h):
        rows, total = list(z), 0.0
        for step in self.steps:
            for n, values in enumerate(step(h)):
                u, w, b = values[: z.shape[1]], values[z.shape[1] : -1], values[-1]
                wu = w @ u
                u = u + (-1 + torch.log1p(torch.exp(wu)) - wu) * w / w.norm() ** 2
                inner = w @ rows[n] + b
                psi = (1 - torch.tanh(inner) ** 2) * w
                total = total + torch.log(torch.abs(1 + u @ psi))
                rows[n] = rows[n] + u * torch.tanh(inner)
        return torch.stack(rows), total


class InverseAutoregressive(nn.Module):
    """Kingma et al. 2016, algorithm 1 with the gate of eq. 14, unit by unit. Odd steps reverse the order of the units.

    Hidden unit j depends on the first (j mod L) units of the order. The i-th unit of the order depends on the hidden
    units that depend on none from i on.
    """

    def __init__(self, latent, features, hidden, length):
        super().__init__()
        self.into = nn.ModuleList(nn.Linear(latent, hidden) for _ in range(length))
        self.context = nn.ModuleList(nn.Linear(features, hidden, bias=False) for _ in range(length))
        self.mean = nn.ModuleList(nn.Linear(hidden, latent) for _ in range(length))
        self.gate = nn.ModuleList(nn.Linear(hidden, latent) for _ in range(length))

    def forward(self, z, h):
        total = 0.0
        for k in range(len(self.into)):
            z, log_det = self.step(k, z, h)
            total = total + log_det
        return z, total

    def step(self, k, z, h):
        size = z.shape[1]
        order = list(range(size))[:: -1 if k % 2 else 1]
        units = []
        for j, row in enumerate(self.into[k].weight):
            inputs = order[: j % size]
            pre = self.into[k].bias[j] + h @ self.context[k].weight[j]
            units.append(F.elu(pre + z[:, inputs] @ row[inputs]))
        new, total = [None] * size, 0.0
        for place, i in enumerate(order):
            chosen = [j for j in range(len(units)) if j % size <= place]
            hidden = torch.stack([units[j] for j in chosen], dim=1)
            m = hidden @ self.mean[k].weight[i, chosen] + self.mean[k].bias[i]
            sigma = torch.sigmoid(hidden @ self.gate[k].weight[i, chosen] + self.gate[k].bias[i])
            new[i] = sigma * z[:, i] + (1 - sigma) * m
            total = total + torch.log(sigma).sum()
        return torch.stack(new, dim=1), total
