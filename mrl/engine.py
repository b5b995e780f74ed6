"""How a network runs: its precision, and the fastest engine where it is only evaluated."""

from __future__ import annotations

import logging
import math
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

# An export takes some seconds, and more for large networks.
WORTH_AN_EXPORT_SECONDS = 20.0
# Largest allowed distance between the outputs of the two engines, relative to their length: cosines above 0.9999.
TOLERANCE = 1e-3


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return a context in which a model computes in ``precision``: fp32, bf16 or fp16."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")


def good_batch_size(device: torch.device) -> int:
    """Return a fast batch size for evaluation; on a CPU, one whose activations fit in its cache."""
    return 256 if device.type == "cuda" else 32


class FastForward:
    """Compute ``module`` on batches, with the engine that `fast_forward` chooses at the first batch.

    Args:
        module: Images ``(B, 3, H, W)`` -> ``(B, D)``, on the device of the batches.
        num_images: How many images there are to compute.
        report: Called with the name of the engine.
    """

    def __init__(self, module: nn.Module, num_images: int, report: Callable[[str], object]):
        self._module, self._num_images, self._report = module, num_images, report
        self._run: Callable[[Tensor], Tensor] | None = None

    def __call__(self, batch: Tensor) -> Tensor:
        if self._run is None:
            self._run, engine = fast_forward(self._module, batch, self._num_images)
            self._report(engine)
        return self._run(batch)


def fast_forward(
    module: nn.Module, images: Tensor, num_images: float = math.inf
) -> tuple[Callable[[Tensor], Tensor], str]:
    """Return ``module`` in eval mode as a function of batches like ``images``, and the name of the engine.

    On a CPU it is ONNX Runtime (1.4 to 3 times as fast as PyTorch, see docs/SPEED.md) if that is installed, can run the
    module, gives the same values on ``images``, and ``num_images`` take PyTorch longer than an export. Otherwise it is
    the module itself.
    """
    module = module.eval()
    if images.device.type != "cpu":
        return module, "PyTorch"
    try:
        # In float32, and with ordinary tensors, because the exporter refuses those of inference mode.
        with torch.autocast("cpu", enabled=False), torch.inference_mode(False), torch.no_grad():
            images = images.float().clone()
            module(images)  # the first call is slower
            start = time.perf_counter()
            expected = module(images)
            seconds = (time.perf_counter() - start) * num_images / len(images)
            if seconds < WORTH_AN_EXPORT_SECONDS:
                return module, "PyTorch"
            run = _onnx_runtime(module, images[:2])
        difference = ((run(images) - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)).max()
        if difference <= TOLERANCE:
            return run, "ONNX Runtime"
        reason = f"its values differ by {difference:.2g} of their length"
    except Exception as error:  # the exporter raises many kinds of errors
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return module, f"PyTorch (ONNX Runtime: {reason})"


def _onnx_runtime(module: nn.Module, images: Tensor) -> Callable[[Tensor], Tensor]:
    import onnxruntime
    import onnxscript  # noqa: F401 - the exporter needs it

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "module.onnx"
        batch = {0: torch.export.Dim("batch")}
        program = torch.onnx.export(module, (images,), dynamic_shapes=(batch,), dynamo=True, verbose=False)
        assert program is not None  # it is None only with dynamo=False
        program.save(path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    [name] = [argument.name for argument in session.get_inputs()]
    return lambda batch: torch.from_numpy(session.run(None, {name: batch.contiguous().numpy()})[0])
