"""A training step of MRL in the manner of the authors' published loop, to compare with.

Written anew, not copied: a module around each strided convolution that blurs first, one classifier per size, a list of
cross-entropies, autocast to fp16 with loss scaling, and a progress text at every step (their default log level, which
does not read the loss back from the GPU).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm


class BlurThenConv(nn.Module):
    """A fixed 3x3 blur, then a strided convolution."""

    kernel: Tensor

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.conv = conv
        line = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer("kernel", torch.outer(line, line).repeat(conv.in_channels, 1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(F.conv2d(images, self.kernel, padding=1, groups=self.conv.in_channels))


class ClassifierPerSize(nn.Module):
    """One classifier per prefix of the embedding; returns a tuple of logits."""

    def __init__(self, dims: Sequence[int], num_classes: int):
        super().__init__()
        self.classifiers = nn.ModuleList([nn.Linear(dim, num_classes) for dim in dims])

    def forward(self, z: Tensor) -> tuple[Tensor, ...]:
        return tuple(classify(z[:, : classify.in_features]) for classify in self.classifiers)


def summed_losses(outputs: tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Return the sum of the cross-entropies of all logits, with label smoothing 0.1."""
    losses = torch.stack([F.cross_entropy(output, labels, label_smoothing=0.1) for output in outputs])
    return (torch.ones_like(losses) * losses).sum()


def build_authors_model(backbone: str, dims: Sequence[int], num_classes: int, blurpool: bool) -> nn.Module:
    """Return a timm ResNet with a classifier per size and, if ``blurpool``, its strided convolutions wrapped."""
    model = timm.create_model(backbone, num_classes=num_classes)
    model.set_submodule("fc", ClassifierPerSize(dims, num_classes))
    for name, module in list(model.named_modules()) if blurpool else []:
        if isinstance(module, nn.Conv2d) and max(module.stride) > 1 and module.in_channels >= 16:
            model.set_submodule(name, BlurThenConv(module))
    return model


def authors_step(model: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype) -> Callable[[], None]:
    """Return a function that takes one training step on the given batch."""
    model.to(images.device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    norms = [p for name, p in model.named_parameters() if "bn" in name]
    others = [p for name, p in model.named_parameters() if "bn" not in name]
    groups = [{"params": norms, "weight_decay": 0.0}, {"params": others, "weight_decay": 1e-4}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler(images.device.type, enabled=dtype == torch.float16)
    bar = tqdm(file=open(os.devnull, "w"))  # noqa: SIM115 - open as long as the step is in use
    losses: list[Tensor] = []

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(images.device.type, dtype):
            loss = summed_losses(model(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())
        rates = [f"{group['lr']:.3f}" for group in optimizer.param_groups]
        bar.set_description(f"iter={len(losses)}, shape={tuple(images.shape)}, lrs={rates}")

    return step
