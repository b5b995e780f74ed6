"""What there is to beat: a training step of MRL in plain torch, in the manner of the authors' published loop.

Written anew, not copied: a module around each strided convolution that blurs first, a classifier and
logits of their own for each size, a cross-entropy for each in a Python list, autocast to fp16 with
loss scaling, and at every step the loss kept and a line of text shown, as at their default log level
(which does not read the loss back from the GPU).
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
    """A strided convolution behind a fixed 3x3 blur, as two calls."""

    kernel: Tensor

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.conv = conv
        line = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer("kernel", torch.outer(line, line).repeat(conv.in_channels, 1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(F.conv2d(images, self.kernel, padding=1, groups=self.conv.in_channels))


class ClassifierPerSize(nn.Module):
    """One classifier for each prefix of the embedding; a tuple of logits."""

    def __init__(self, dims: Sequence[int], num_classes: int):
        super().__init__()
        self.dims = tuple(dims)
        self.classifiers = nn.ModuleList([nn.Linear(dim, num_classes) for dim in dims])

    def forward(self, z: Tensor) -> tuple[Tensor, ...]:
        return tuple(classify(z[:, :dim]) for dim, classify in zip(self.dims, self.classifiers, strict=True))


class SummedLosses(nn.Module):
    """The sum of one cross-entropy for each logits of a tuple."""

    def __init__(self, label_smoothing: float):
        super().__init__()
        self.criterion = nn.CrossEntropyLoss(label_smoothing=label_smoothing)

    def forward(self, outputs: tuple[Tensor, ...], labels: Tensor) -> Tensor:
        losses = torch.stack([self.criterion(output, labels) for output in outputs])
        return (torch.ones_like(losses) * losses).sum()


def build_authors_model(backbone: str, dims: Sequence[int], num_classes: int, blurpool: bool) -> nn.Module:
    """A timm ResNet with a classifier for each size in place of its own, its strided convolutions wrapped."""
    model = timm.create_model(backbone, num_classes=num_classes)
    model.set_submodule("fc", ClassifierPerSize(dims, num_classes))
    strided = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and max(module.stride) > 1 and module.in_channels >= 16
    ]
    for name, conv in strided if blurpool else []:
        model.set_submodule(name, BlurThenConv(conv))
    return model


def authors_step(model: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype) -> Callable[[], None]:
    """One step on a batch that is there already, with what the loop does around it at its default log level."""
    device = images.device
    model.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    loss_function = SummedLosses(label_smoothing=0.1)
    norms = [p for name, p in model.named_parameters() if "bn" in name]
    others = [p for name, p in model.named_parameters() if "bn" not in name]
    groups = [{"params": norms, "weight_decay": 0.0}, {"params": others, "weight_decay": 1e-4}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    losses: list[Tensor] = []
    bar = tqdm(file=open(os.devnull, "w"))  # noqa: SIM115 - as long as the step is used

    def step() -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype):
            loss = loss_function(model(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())
        rates = [f"{group['lr']:.3f}" for group in optimizer.param_groups]
        bar.set_description(f"iter={len(losses)}, shape={tuple(images.shape)}, lrs={rates}")

    return step
