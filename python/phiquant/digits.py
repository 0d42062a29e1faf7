"""A small trained image classifier to try representations on: scikit-learn's 8 x 8 digits and a LeNet.

The data ships with scikit-learn, nothing is downloaded; training takes a few seconds and is the same every
time on one machine. It stands where the literature's first examples use MNIST.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .extras import need

TRAIN = 1297  # of 1797 images; the other 500 are the test, where one image is 0.2 points


class Digits(NamedTuple):
    """x: float32 [N, 1, 8, 8] in [0, 1]; y: int64 [N], the digit."""

    x: Tensor
    y: Tensor


def data() -> tuple[Digits, Digits]:
    """(train, test): 1297 and 500 images, a shuffle that never changes. ImportError without scikit-learn."""
    loaded = need("sklearn.datasets", extra="notebooks").load_digits()
    x = torch.tensor(loaded.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(loaded.target, dtype=torch.int64)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:TRAIN], order[TRAIN:]
    return Digits(x[train], y[train]), Digits(x[test], y[test])


def lenet(seed: int = 0) -> nn.Sequential:
    """An untrained LeNet for 8 x 8 images, 31 thousand parameters: x [N, 1, 8, 8] -> logits [N, 10]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(128, 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
            nn.Linear(84, 10),
        )


def train(
    model: nn.Module | None = None,
    *,
    epochs: int = 30,
    learning_rate: float = 3e-3,
    batch: int = 32,
    seed: int = 0,
    after_step: Callable[[nn.Module], None] | None = None,
) -> nn.Module:
    """Train `model` (a new LeNet if None) on the training images, in place; returns it in eval mode.

    AdamW with a cosine schedule. The order of the images depends on `seed` alone. after_step(model) is
    called after each step of the optimizer, for constraints that must hold in training (masks, codebooks).
    """
    model = lenet(seed) if model is None else model
    images, labels = data()[0]
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(images) // batch))
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(images), generator=generator).split(batch):
            optimizer.zero_grad()
            F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()
            schedule.step()
            if after_step is not None:
                after_step(model)
    return model.eval()


@torch.no_grad()
def accuracy(model: Callable[[Tensor], Tensor], digits: Digits | None = None) -> float:
    """Share of `digits` (the test images if None) whose largest logit is the right digit, 0 to 1.

    model: a module or function, x [N, 1, 8, 8] -> logits [N, 10]. A module's mode is left as it is.
    """
    images, labels = data()[1] if digits is None else digits
    return (model(images).argmax(1) == labels).double().mean().item()
