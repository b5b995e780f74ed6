"""Checks that model, images and machine fit together, before a run writes anything."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import yaml

from mrl.config import Config, images_of_weights
from mrl.engine import autocast
from mrl.errors import UserError
from mrl.model import MatryoshkaClassifier, build_backbone, build_model, find_culprit, works


def check_fit(model: MatryoshkaClassifier, config: Config, micro_batch_size: int) -> None:
    """Try a dummy training step at each ``data.train_px`` of the run, and a dummy validation at ``data.eval_px``.

    On a GPU with as many images as in training, so that a full memory shows now, on a CPU with two. The model does not
    change.
    """
    on_gpu = next(model.parameters()).device.type == "cuda"
    num_images = micro_batch_size if on_gpu else min(2, micro_batch_size)
    for key, px in _sizes(config):
        try:
            precision = config.train.precision if on_gpu else "fp32"
            _try(model, num_images, px, training=key == "data.train_px", precision=precision)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            reason = (str(error) or type(error).__name__).split("\n")[0].strip(" .")
            remedy = _remedy(model, config, micro_batch_size)
            raise UserError(f"{config.model.backbone} does not work at {key} {px}: {reason}{remedy}") from error


def _sizes(config: Config) -> list[tuple[str, int]]:
    """Return the settings and values of all resolutions of a run."""
    train_px = sorted({config.data.px_at(epoch) for epoch in range(config.train.epochs)})
    return [*(("data.train_px", px) for px in train_px), ("data.eval_px", config.data.eval_px)]


def _try(model: MatryoshkaClassifier, num_images: int, px: int, training: bool, precision: str = "fp32") -> None:
    """Compute the gradients, or without ``training`` the logits, of ``num_images`` images of noise."""
    device = next(model.parameters()).device
    images = torch.randn(num_images, 3, px, px, device=device).contiguous(memory_format=torch.channels_last)
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]  # BatchNorm statistics
    try:
        model.train(training)
        with autocast(device, precision), torch.set_grad_enabled(training):
            z = model.embed(images)
            if z.shape != (num_images, model.width):
                wanted = f"not one pooled vector of {model.width} numbers each"
                raise ValueError(f"{num_images} images give {tuple(z.shape)}, {wanted}")
            loss = model.head(z).float().square().mean()
        if training:
            trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
            torch.autograd.grad(loss, trainable, allow_unused=True)
    finally:
        for buffer, value in before:
            buffer.copy_(value)


def _remedy(model: MatryoshkaClassifier, config: Config, micro_batch_size: int) -> str:
    """Return the first change of settings that was found to work, as the end of a sentence, or ""."""
    wanted, data, sizes = config.model, config.data, _sizes(config)
    given, largest = wanted.kwargs, max(px for _, px in sizes)

    def attempt(kwargs: dict[str, Any], sizes: list[tuple[str, int]] = sizes) -> None:
        # With the weights too, because they do not fit all arguments.
        about = (wanted.stem_stride, wanted.blurpool, kwargs, wanted.projection)
        backbone = build_backbone(wanted.backbone, wanted.init, *about)
        for key, px in sizes:
            _try(build_model(backbone, 2), 2, px, training=key == "data.train_px")

    def yaml_of(kwargs: dict[str, Any]) -> str:
        return yaml.safe_dump(kwargs, default_flow_style=True, width=math.inf, sort_keys=False).strip()

    if micro_batch_size == 1 and works(attempt, given):
        return (
            f"; BatchNorm needs more than one image at a time: raise data.batch_size, now {data.batch_size}, or lower "
            f"train.accumulation_steps, now {config.train.accumulation_steps}, or the number of processes"
        )
    if culprit := find_culprit(attempt, given):
        return f"; take {yaml_of(culprit)} out of model.kwargs"
    for more in ({"img_size": largest}, {"dynamic_img_size": True}, {"strict_img_size": False}):
        if works(attempt, kwargs := {**given, **more}):
            return f"; give --model.kwargs '{yaml_of(kwargs)}'"
    own = given.get("img_size", model.backbone.pretrained_cfg["input_size"][-1])  # type: ignore[index]
    if isinstance(own, int) and works(attempt, given, [("data.train_px", own), ("data.eval_px", own)]):
        resize = max(own, round(own * data.eval_resize_px / data.eval_px))
        return f"; give it its own size: --data.train_px {own} --data.eval_px {own} --data.eval_resize_px {resize}"
    return ""


def notes(config: Config, device: torch.device, num_images: int, batch_size: int, warmup_epochs: float) -> list[str]:
    """Return sentences on settings that were changed, or may not do what the user expects."""
    found, data, precision = [], config.data, config.train.precision
    if batch_size < data.batch_size:
        found.append(
            f"batch cut from {data.batch_size} to {batch_size} images, so that an epoch of {num_images:,} images has "
            f"{num_images // batch_size} steps"
        )
    if warmup_epochs < config.optim.warmup_epochs:
        found.append(f"warm-up shortened from {config.optim.warmup_epochs:g} to {warmup_epochs:g} epochs")
    own = images_of_weights(config.model.backbone, config.model.init)
    if own and not np.allclose([own["mean"], own["std"]], [data.mean, data.std], atol=1e-3):
        found.append(
            f"note: data.mean {list(data.mean)} and data.std {list(data.std)} are not those of the weights in "
            f"model.init, {list(own['mean'])} and {list(own['std'])}"
        )
    if precision == "bf16" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        found.append("note: this GPU has no bfloat16 arithmetic; --train.precision fp16 is faster")
    return found
