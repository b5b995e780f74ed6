"""Train a backbone with a nested head: MRL (a classifier for each prefix size), MRL-E (one for all) or FF (one size).

    python train.py --config digits_mrl.yaml                              # a minute on a laptop, no download
    python train.py --config finetune_mrl_cpu.yaml --data.root DIR        # your photographs; finetune_mrl for a GPU
    torchrun --nproc_per_node=8 train.py --config resnet50_mrl.yaml --data.root DIR

Fills the run directory <run.dir>/<run.name>. Stop it with Ctrl-C; resume it with --run.resume auto. configs/ has the
other recipes. Any setting below may follow, e.g. --run.name mine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.profiler import record_function

from mrl import distributed, rundir
from mrl.config import Config, parse_command_line, to_yaml
from mrl.data import BACKENDS, build_data
from mrl.data.images import EvalImages, Images
from mrl.data.transforms import cut_batch, eval_indices, train_indices
from mrl.distributed import Process
from mrl.engine import autocast
from mrl.errors import UserError
from mrl.matryoshka import check_weights, nested_cross_entropy, self_distillation
from mrl.model import MatryoshkaClassifier, ModelInfo, build_backbone, build_model, freeze, load_head, save_model
from mrl.progress import progress
from mrl.training.augmentation import make_augmentation, seed_step
from mrl.training.fit import check_fit, notes
from mrl.training.frozen import CachedImages, TrunkCache
from mrl.training.logging import MetricAccumulator, StopSignals, Tracker, advice
from mrl.training.optim import build_optimizer, lr_at, set_lr, shorten_warmup
from mrl.training.profiling import step_profiler


def train(config: Config, process: Process) -> int:
    """Train as ``config`` says; return the exit status, 128 + the signal's number if one stopped the run."""
    # Set-up: run directory, data, model, optimizer.
    optim, device, seed = config.optim, process.device, config.run.seed
    directory = Path(config.run.dir) / config.run.name
    root = Path(config.data.root or "").resolve()
    holds_classes = config.data.root and config.data.val_share and not (root / "train").is_dir()
    if holds_classes and directory.resolve().is_relative_to(root):
        raise UserError(f"run.dir is {config.run.dir!r}; allowed: outside data.root, whose folders are the classes")
    if process.is_main:
        rundir.check_run(directory, config.run.resume, to_yaml(config), to_yaml(Config()))
    distributed.barrier()
    resumed = rundir.load_checkpoint(directory)
    if not distributed.agree(resumed is not None):
        raise UserError(f"{directory} is not the same folder on all machines; run.dir must be shared")

    crop_seed = seed if config.train.cache_seed is None else config.train.cache_seed
    before = rundir.read_held_out(directory) if resumed else None  # a moved image must not change its split
    images = build_data(config.data, crop_seed, device, process.is_main, held_out=before)
    unreadable, held_out = [reason for part in images.values() for reason in part.unreadable], images["val"].held_out
    num_images, classes = len(images["train"]), images["train"].classes
    data_seen = {"num_images": num_images, "num_val": len(images["val"]), "classes": classes}
    data_seen["backend"] = BACKENDS[type(images["train"])]
    if resumed is not None:
        rundir.check_data(directory, resumed["data"], data_seen)
    accumulation_steps = config.train.accumulation_steps
    share = (process.rank, process.world_size, accumulation_steps)
    splits = accumulation_steps * (1 + (config.data.mixup + config.data.cutmix > 0))  # they take images in pairs
    cut = cut_batch(config.data.batch_size, num_images, config.data.min_steps_per_epoch, process.world_size, splits)
    batch_size = resumed.get("batch_size", cut) if resumed else cut  # other processes would cut it to another size
    if resumed and batch_size % (process.world_size * splits):
        raise UserError(
            f"{directory} was started with {batch_size} images a step; allowed: a number of processes, and "
            f"train.accumulation_steps, that divide them{' by pairs' if splits > accumulation_steps else ''}"
        )
    micro_batch_size = len(train_indices(num_images, batch_size, seed, 0, *share)[0])
    steps_per_epoch = num_images // batch_size
    total_steps = config.train.epochs * steps_per_epoch
    warmup_epochs = shorten_warmup(optim.warmup_epochs, config.train.epochs)

    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    start, init = config, Path(config.model.init)
    if resumed is not None:  # all weights are in the checkpoint; those of cached layers are in the saved model
        saved = str(directory) if (directory / "model.json").exists() else config.model.init
        weights_from = saved if config.train.cache_views else "scratch"
        start = dataclasses.replace(config, model=dataclasses.replace(config.model, init=weights_from))
    model = make_model(start, len(classes)).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    from_run = config.model.init not in ("scratch", "pretrained") and init.is_dir()
    head_loaded = resumed is None and from_run and load_head(model, init, classes)
    dims = model.head.nesting_list
    ends = sorted({dims[0], dims[-1]})
    weights = torch.tensor(check_weights(config.head.weights, dims), device=device)
    check_fit(model, config, micro_batch_size)
    if config.train.sync_batchnorm:
        model = distributed.sync_batchnorm(model, process)
    frozen = {}
    inputs_of: Mapping[str, Images | CachedImages] = images
    if views := config.train.cache_views:  # from here on, the model is its trainable tail
        frozen = model.state_dict()
        store = directory.parent / "trunk_cache"
        cache = TrunkCache(model, config, store, config.train.precision, process)
        model, cached = cache.tail, {split: CachedImages(cache, split, some) for split, some in images.items()}
        for epoch in range(views):
            cached["train"].view(epoch, config.data.px_at(epoch))
        cached["val"].center()
        inputs_of = cached
    optimizer = build_optimizer(model, optim.name, optim.lr, optim.momentum, optim.weight_decay, optim.layer_decay)
    in_precision = autocast(device, config.train.precision)
    scaler = torch.amp.GradScaler(device.type, enabled=config.train.precision == "fp16")
    ema = ModelEmaV3(model, config.train.ema_decay, use_warmup=True) if config.train.ema_decay > 0 else None
    augment = make_augmentation(config.data, micro_batch_size, len(classes), device)
    sums = MetricAccumulator(dims, device)
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "scaler": scaler}
    parts |= {} if ema is None else {"ema": ema.module}

    step = 0
    if resumed is not None:
        step = resumed["step"]
        for name, part in parts.items():
            part.load_state_dict(resumed[name])
        if process.is_main:  # the checkpoint holds the sums over all processes
            sums.values[:3] = resumed["sums"]
        del resumed
    if config.train.compile:
        model.compile()
    parallel = distributed.data_parallel(model, process, config.train.gradient_precision)
    if process.is_main:
        rundir.open_run(directory, to_yaml(config))
        if unreadable:
            rundir.atomic_write_text(directory / "unreadable.txt", "\n".join(unreadable) + "\n")
        if held_out is not None:
            rundir.atomic_write_text(directory / "held_out.json", json.dumps(held_out, indent=0) + "\n")

    with (
        rundir.hold(directory) if process.is_main else contextlib.nullcontext(),
        Tracker(directory, process.is_main, step, total_steps, batch_size) as tracker,
        step_profiler(config.train.profile_steps, directory, process, tracker.log_line) as profile_step,
        StopSignals() as signals,
    ):
        with signals.waiting():
            tracker.start_wandb(config.wandb, config.run.name, dataclasses.asdict(config))
        if process.is_main:
            rundir.record_start(directory, step, process.world_size, micro_batch_size)
        tracker.log_line(
            f"{directory}: {config.model.backbone} on {device.type}, prefixes {list(dims)}{' tied' * model.head.tied}; "
            f"steps {step} to {total_steps}, {steps_per_epoch} an epoch; {batch_size} images a step = "
            f"{process.world_size} processes x {accumulation_steps} micro-batches x {micro_batch_size}"
        )
        if head_loaded:
            tracker.log_line(f"the head is that of {config.model.init}, which has the same classes and sizes")
        for note in notes(config, device, num_images, batch_size, warmup_epochs):
            tracker.log_line(note)
        saved_at = logged_at = time.monotonic()
        logged_step, waited = step, 0.0

        # A run that stopped at the end of an epoch, before its validation ended, resumes with that validation.
        unvalidated = step > 0 and distributed.all_reduce_any(process.is_main and not tracker.validated(step))[0]
        first_epoch = (step - 1 if unvalidated else step) // steps_per_epoch
        for epoch in range(first_epoch, config.train.epochs):
            start_step, end_step = step - epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch
            indices = train_indices(num_images, batch_size, seed, epoch, *share, start_step=start_step)
            batches = inputs_of["train"].train_batches(indices, epoch, config.data.px_at(epoch))
            model.train()
            while step < end_step:
                # One step of gradient descent on the weighted sum over prefixes (equation 1 of the paper).
                seed_step(seed, step, process.rank)
                lr = lr_at(step, total_steps, warmup_epochs * steps_per_epoch, optim.lr, optim.schedule)
                set_lr(optimizer, lr)
                for micro_step in range(accumulation_steps):
                    asked_at = time.monotonic()
                    with record_function("data wait"), signals.waiting():
                        inputs, labels = next(batches)
                    waited += time.monotonic() - asked_at
                    inputs, targets = augment(inputs, labels)
                    with distributed.no_sync(parallel, micro_step < accumulation_steps - 1):
                        with record_function("forward"), in_precision:
                            logits = parallel(inputs)  # (G, B, C)
                            losses = nested_cross_entropy(logits, targets, config.train.label_smoothing)  # (G,)
                        sums.add(logits, labels, losses)
                        with record_function("backward"):
                            if config.head.self_distillation > 0:
                                losses = losses + config.head.self_distillation * self_distillation(logits)
                            scaler.scale((weights * losses).sum() / accumulation_steps).backward()
                with record_function("optimizer"):
                    if optim.clip_norm > 0:
                        scaler.unscale_(optimizer)
                        nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)
                    scaler.step(optimizer)
                    scaler.update()
                    optimizer.zero_grad()
                    if ema is not None:
                        ema.update(model, step + 1)
                step += 1
                profile_step()
                tracker.advance()

                # Once in a while: log, save, stop.
                log = step % config.train.log_every_steps == 0 or step == end_step
                due = time.monotonic() - saved_at > 60 * config.train.checkpoint_minutes
                stop, save = distributed.all_reduce_any(bool(signals), due and process.is_main)
                save = save or stop or step == end_step
                if log or save:
                    sums.check_finite(step, batch_size, model.parameters() if save else ())
                if log:
                    row = {"step": step, "epoch": step / steps_per_epoch, "lr": lr}
                    row |= sums.means("loss", "train_top_1")
                    seconds = time.monotonic() - logged_at
                    row["images_per_second"] = (step - logged_step) * batch_size / seconds
                    row["data_wait"] = waited / seconds
                    shown = ", ".join(f"{row[f'loss/{d}']:.2f} {row[f'train_top_1/{d}']:.0%} @{d}" for d in ends)
                    tracker.log(row, f"epoch {epoch + 1}/{config.train.epochs}, loss and top-1 {shown}")
                    sums.values.zero_()
                    logged_at, logged_step, waited = time.monotonic(), step, 0.0
                if save:
                    all_sums = distributed.all_reduce_sum(sums.values)
                    if process.is_main:
                        states = {name: part.state_dict() for name, part in parts.items()}
                        about = {"step": step, "batch_size": batch_size, "sums": all_sums[:3], "data": data_seen}
                        rundir.save_checkpoint(directory, about | states)
                    saved_at = time.monotonic()
                if stop:
                    number = signal.Signals(signals.number or signal.SIGTERM)
                    tracker.log_line(f"stopped by {number.name}, saved after step {step}; resume: --run.resume auto")
                    return 128 + number

            if (epoch + 1) % config.train.eval_every_epochs == 0 or epoch + 1 == config.train.epochs:
                final: MatryoshkaClassifier = model if ema is None else ema.module
                validated = [("", "", final)]
                if ema is not None:
                    validated = [("", " of the moving average (saved)", final), ("no_ema_", " without it", model)]
                scores: dict[str, float] = {}
                for key_start, which, each in validated:
                    distributed.broadcast_buffers(each)
                    with signals.waiting():
                        found = validate(each, inputs_of["val"], micro_batch_size, process, in_precision)
                    scores |= {key_start + key: value for key, value in found.items()}
                    shown = ", ".join(f"{found[f'top_1/{d}']:.4f} @{d}" for d in dims)
                    tracker.log_line(f"epoch {epoch + 1}: top-1{which} {shown}")
                if process.is_main:
                    save_model(final, describe(config, final, classes), directory, frozen)
                tracker.log({"step": step, "epoch": epoch + 1} | scores)
                logged_at = time.monotonic()
        tracker.log_line(f"done: {directory}. Next: python eval.py --runs {directory}")
    return 0


def make_model(config: Config, num_classes: int) -> MatryoshkaClassifier:
    """Return the model with a new head on the weights of ``model.init``, and freeze all but ``model.trainable``."""
    wanted = config.model
    about = (wanted.stem_stride, wanted.blurpool, wanted.kwargs, wanted.projection)
    backbone = build_backbone(wanted.backbone, wanted.init, *about)
    dims = None if config.head.nesting_list == "auto" else config.head.nesting_list
    model = build_model(backbone, num_classes, dims, config.head.tied, config.head.scaled)
    freeze(model, wanted.trainable)
    return model


def describe(config: Config, model: MatryoshkaClassifier, classes: list[str]) -> ModelInfo:
    """Return the content of model.json."""
    return ModelInfo(
        backbone=config.model.backbone,
        kwargs=config.model.kwargs,
        stem_stride=config.model.stem_stride,
        blurpool=config.model.blurpool,
        nesting_list=model.head.nesting_list,
        tied=model.head.tied,
        classes=tuple(classes),
        resize_px=config.data.eval_resize_px,
        crop_px=config.data.eval_px,
        mean=config.data.mean,
        std=config.data.std,
        exif_rotation=config.data.exif_rotation,
        interpolation=config.data.interpolation,
        projection=config.model.projection,
        scaled=model.head.scaled,
    )


@torch.no_grad()
def validate(
    model: MatryoshkaClassifier, images: EvalImages, batch_size: int, process: Process, in_precision: torch.autocast
) -> dict[str, float]:
    """Return ``{top_1/dim, val_loss/dim}`` over the validation images, each counted once by one of the processes."""
    model.eval()
    indices = eval_indices(len(images), batch_size, process.rank, process.world_size)
    sums = MetricAccumulator(model.head.nesting_list, process.device)
    batches = images.eval_batches(indices)
    bar = progress(batches, show=process.is_main, desc="validate", total=len(indices), unit="batch", leave=False)
    for inputs, labels in bar:
        with in_precision:
            z = model.embed(inputs)
        logits = model.head(z.float())  # in fp32, because many bfloat16 logits are equal
        sums.add(logits, labels, nested_cross_entropy(logits, labels))
    return sums.means("val_loss", "top_1")


def main(argv: list[str] | None = None) -> int:
    """Train from a command line; return the exit status."""

    def parse_and_train() -> int:
        config = parse_command_line(argv, description=str(__doc__))
        process = distributed.start()
        with advice(config, process.world_size):
            status = train(config, process)
        distributed.barrier()  # torchrun ends the others when one exits, even while W&B uploads
        return status

    interrupted = "interrupted; the last checkpoint, if there is one, is kept: resume it with --run.resume auto"
    return distributed.run(parse_and_train, interrupted)


if __name__ == "__main__":
    sys.exit(main())
