"""Train a backbone with a nested head: MRL, MRL-E, a fixed-feature model or a plain classifier.

    python train.py --config digits_mrl.yaml                                # a minute on a laptop, no download
    python train.py --config resnet50_ff.yaml --data.root DIR --head.nesting_list '[64]' --run.name resnet50_ff64
    torchrun --nproc_per_node=8 train.py --config resnet50_mrl.yaml --data.root DIR

Fills the run directory <run.dir>/<run.name>. Stop it with Ctrl-C; go on with --run.resume auto.
"""

from __future__ import annotations

import dataclasses
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn

from mrl import distributed
from mrl.config import Config, parse_command_line, to_yaml
from mrl.data import BACKENDS, Images, build_data
from mrl.data.transforms import eval_indices, train_indices
from mrl.distributed import Process
from mrl.errors import UserError
from mrl.matryoshka import check_weights, nested_cross_entropy
from mrl.model import MatryoshkaClassifier, ModelInfo, build_backbone, build_model, freeze, save_model
from mrl.progress import progress
from mrl.rundir import (
    check_run,
    load_checkpoint,
    open_run,
    record_start,
    refuse_other_data,
    save_checkpoint,
)
from mrl.training.augmentation import make_augmentation, seed_step
from mrl.training.compiling import compile_or_stay_eager
from mrl.training.logging import FiniteCheck, MetricAccumulator, Tracker, gpu_memory_advice, stop_signals
from mrl.training.optim import build_optimizer, lr_at, px_at, set_lr
from mrl.training.profiling import StepProfiler


def train(config: Config, process: Process) -> int:
    """Train as ``config`` says; returns the exit status, 128 + the signal's number if one stopped the run."""
    # Set-up: run directory, data, model, optimizer.
    optim, device, seed = config.optim, process.device, config.run.seed
    directory = Path(config.run.dir) / config.run.name
    if process.is_main:
        check_run(directory, config.run.resume, to_yaml(config))
    distributed.barrier()
    resumed = load_checkpoint(directory)
    found, missing = distributed.all_reduce_any(resumed is not None, resumed is None)
    if found and missing:
        raise UserError(f"{directory} is not the same folder on all machines; run.dir must be one that they share")

    images = build_data(config.data, seed, device, process.is_main)
    num_images, classes = len(images["train"]), images["train"].classes
    data_seen = {"num_images": num_images, "classes": classes, "backend": BACKENDS[type(images["train"])]}
    accumulation_steps, batch_size = config.train.accumulation_steps, config.data.batch_size
    split = (process.rank, process.world_size, accumulation_steps)
    micro_batch_size = len(train_indices(num_images, batch_size, seed, 0, *split)[0])
    steps_per_epoch = num_images // batch_size
    total_steps = config.train.epochs * steps_per_epoch

    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    model = make_model(config, len(classes)).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.train.sync_batchnorm:
        model = distributed.sync_batchnorm(model, process)
    dims = model.head.nesting_list
    ends = sorted({dims[0], dims[-1]})
    weights = torch.tensor(check_weights(config.head.weights, dims), device=device)
    optimizer = build_optimizer(model, optim.name, optim.lr, optim.momentum, optim.weight_decay, optim.layer_decay)
    dtype = torch.float16 if config.train.precision == "fp16" else torch.bfloat16
    autocast = torch.autocast(device.type, dtype, enabled=config.train.precision != "fp32")
    scaler = torch.amp.GradScaler(device.type, enabled=config.train.precision == "fp16")
    ema = ModelEmaV3(model, config.train.ema_decay) if config.train.ema_decay > 0 else None
    augment = make_augmentation(config.data, micro_batch_size, len(classes), device)

    step, sums, finite = 0, MetricAccumulator(dims, device), FiniteCheck(dims, process)
    if resumed is not None:
        refuse_other_data(directory, resumed["data"], data_seen)
        step = resumed["step"]
        model.load_state_dict(resumed["model"])
        optimizer.load_state_dict(resumed["optimizer"])
        scaler.load_state_dict(resumed["scaler"])
        if ema is not None:
            ema.module.load_state_dict(resumed["ema"])
        if process.is_main:  # it saved the sums of all processes
            sums.values.copy_(resumed["sums"])
        del resumed
    if config.train.compile:
        compile_or_stay_eager(model, micro_batch_size, px_at(0, config.data.train_px), autocast, process)
    parallel = distributed.data_parallel(model, process, config.train.gradient_precision)
    if process.is_main:
        open_run(directory, config.run.resume, to_yaml(config))

    with (
        Tracker(directory, process.is_main, step, total_steps, batch_size) as tracker,
        StepProfiler(config.train.profile_steps, directory, process, tracker.say) as profiler,
        stop_signals() as stopped_by,
    ):
        tracker.start_wandb(**dataclasses.asdict(config.wandb), name=config.run.name, config=dataclasses.asdict(config))
        if process.is_main:
            record_start(directory, process, micro_batch_size, step, tracker.say)
        tracker.say(
            f"{directory}: {config.model.backbone} on {device.type}, prefixes {list(dims)}{' tied' * model.head.tied}; "
            f"steps {step} to {total_steps}, {steps_per_epoch} an epoch; {batch_size} images a step = "
            f"{process.world_size} processes x {accumulation_steps} micro-batches x {micro_batch_size}"
        )
        saved_at = logged_at = time.monotonic()
        logged_step, waited = step, 0.0

        # A run that stopped at the end of an epoch, before or in its validation, begins with that validation.
        validated = step == 0 or not distributed.all_reduce_any(process.is_main and not tracker.validated(step))[0]
        for epoch in range(
            step // steps_per_epoch if validated else (step - 1) // steps_per_epoch, config.train.epochs
        ):
            rows = train_indices(num_images, batch_size, seed, epoch, *split, start_step=step - epoch * steps_per_epoch)
            batches = images["train"].train_batches(rows, epoch, px_at(epoch, config.data.train_px))
            model.train()
            while step < (epoch + 1) * steps_per_epoch:
                # One step: down the gradient of the weighted sum over prefixes (equation 1 of the paper).
                seed_step(seed, step, process.rank)
                lr = lr_at(step, total_steps, optim.warmup_epochs * steps_per_epoch, optim.lr, optim.schedule)
                set_lr(optimizer, lr)
                for micro_step in range(accumulation_steps):
                    profiler.phase("data wait")
                    asked_at = time.monotonic()
                    inputs, labels = next(batches)
                    waited += time.monotonic() - asked_at
                    profiler.phase("forward")
                    inputs, targets = augment(inputs, labels)
                    with distributed.shared_gradients(parallel, micro_step == accumulation_steps - 1):
                        with autocast:
                            logits = parallel(inputs)  # (G, B, C)
                            losses = nested_cross_entropy(logits, targets, config.train.label_smoothing)  # (G,)
                        sums.add(logits, labels, losses)
                        finite.add(losses, step)
                        profiler.phase("backward")
                        scaler.scale((weights * losses).sum() / accumulation_steps).backward()
                profiler.phase("optimizer")
                if optim.clip_norm > 0:
                    scaler.unscale_(optimizer)
                    nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                if ema is not None:
                    ema.update(model)
                step += 1
                profiler.step()
                tracker.advance()

                # Once in a while: log, save, stop.
                epoch_ends = step == (epoch + 1) * steps_per_epoch
                if step % config.train.log_every_steps == 0 or epoch_ends:
                    finite.refuse_non_finite()
                    row = {"step": step, "epoch": step / steps_per_epoch, "lr": lr}
                    row |= sums.means("loss", "train_top_1")
                    seconds = time.monotonic() - logged_at
                    row["images_per_second"] = (step - logged_step) * batch_size / seconds
                    row["data_wait"] = waited / seconds
                    shown = ", ".join(f"{row[f'loss/{d}']:.2f} {row[f'train_top_1/{d}']:.0%} @{d}" for d in ends)
                    tracker.log(row, f"epoch {epoch + 1}/{config.train.epochs}, loss and top-1 {shown}")
                    sums.values.zero_()
                    logged_at, logged_step, waited = time.monotonic(), step, 0.0
                save_due = time.monotonic() - saved_at > 60 * config.train.checkpoint_minutes
                stop, save = distributed.all_reduce_any(bool(stopped_by), save_due and process.is_main)
                if stop or save or epoch_ends:
                    finite.refuse_non_finite()
                    all_sums = distributed.all_reduce_sum(sums.values)
                    if process.is_main:
                        parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "scaler": scaler}
                        parts |= {} if ema is None else {"ema": ema.module}
                        states = {name: part.state_dict() for name, part in parts.items()}
                        save_checkpoint(directory, {"step": step, "sums": all_sums, "data": data_seen, **states})
                    saved_at = time.monotonic()
                if stop:
                    number = signal.Signals(stopped_by[0] if stopped_by else signal.SIGTERM)
                    tracker.say(f"stopped by {number.name} and saved after step {step}; go on with --run.resume auto")
                    tracker.exit_code = 128 + number
                    return 128 + number

            if (epoch + 1) % config.train.eval_every_epochs == 0 or epoch + 1 == config.train.epochs:
                final: MatryoshkaClassifier = model if ema is None else ema.module
                distributed.broadcast_buffers(final)
                scores = validate(final, images["val"], micro_batch_size, process, autocast)
                if process.is_main:
                    save_model(final, describe(config, final, classes), directory)
                tracker.log({"step": step, "epoch": epoch + 1} | scores, None)
                tracker.say(f"epoch {epoch + 1}: top-1 " + ", ".join(f"{scores[f'top_1/{d}']:.4f} @{d}" for d in dims))
                logged_at = time.monotonic()
        tracker.say(f"done: {directory}. Next: python eval.py --runs {directory}")
    return 0


def make_model(config: Config, num_classes: int) -> MatryoshkaClassifier:
    """The untrained model, frozen as asked."""
    wanted = config.model
    backbone = build_backbone(wanted.backbone, wanted.init, wanted.stem_stride, wanted.blurpool, wanted.kwargs)
    dims = None if config.head.nesting_list == "auto" else config.head.nesting_list
    model = build_model(backbone, num_classes, dims, config.head.tied)
    freeze(model, wanted.trainable)
    return model


def describe(config: Config, model: MatryoshkaClassifier, classes: list[str]) -> ModelInfo:
    """What model.json has to say about ``model``."""
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
    )


@torch.no_grad()
def validate(
    model: MatryoshkaClassifier, images: Images, batch_size: int, process: Process, autocast: torch.autocast
) -> dict[str, float]:
    """``{top_1/dim, val_loss/dim}`` over the validation images, each counted once at any number of processes."""
    model.eval()
    rows = eval_indices(len(images), batch_size, process.rank, process.world_size)
    sums = MetricAccumulator(model.head.nesting_list, process.device)
    batches = images.eval_batches(rows)
    for inputs, labels in progress(
        batches, show=process.is_main, desc="validate", total=len(rows), unit="batch", leave=False
    ):
        with autocast:
            z = model.embed(inputs)
        logits = model.head(z.float())  # not in bfloat16, where many logits are equal
        sums.add(logits, labels, nested_cross_entropy(logits, labels))
    return sums.means("val_loss", "top_1")


def main(argv: list[str] | None = None) -> int:
    """Train from a command line; returns the exit status."""
    try:
        with distributed.failing_together():
            config = parse_command_line(argv, description=str(__doc__))
            process = distributed.start()
            with gpu_memory_advice(config, process.world_size):
                status = train(config, process)
            distributed.barrier()  # whoever leaves first makes torchrun end the others, W&B's last words included
            return status
    except (UserError, OSError) as error:
        sys.stderr.write(f"\nerror: {error}\n")  # in one piece, and not behind a progress bar
        return 2
    except KeyboardInterrupt:  # before the first step, from which on the run stops by itself
        sys.stderr.write("\nstopped before the first step; nothing was trained\n")
        return 130
    finally:
        distributed.stop()


if __name__ == "__main__":
    sys.exit(main())
