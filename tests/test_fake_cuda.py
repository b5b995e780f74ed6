"""Device mistakes fail without a GPU: a fake tensor has a device and no values, and refuses to be mixed with another's.

Not here, because they need a GPU: backward passes, kernels, numbers; see test_train_gpu.py.
"""

from functools import partial

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.overrides import TorchFunctionMode

import mrl
import train
from mrl import distributed, rundir
from mrl.config import parse_command_line
from mrl.data.memory import DIGIT_CLASSES, MemoryImages
from mrl.data.transforms import Transform, _per_row
from mrl.distributed import Process
from mrl.model import build_backbone, build_model
from mrl.studies.classification import predict

DIMS, CUDA = (8, 16, 32, 96), torch.device("cuda")


class Answers(TorchFunctionMode):
    """Answers where code asks a tensor on the GPU for its values, and backward passes that do nothing."""

    truth = True

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name, kwargs = getattr(function, "__name__", ""), kwargs or {}
        if name in ("backward", "grad"):
            return None
        if name == "numpy":
            assert args[0].device.type == "cpu"
            return np.empty(args[0].shape, str(args[0].dtype).removeprefix("torch."))
        if name == "__getitem__":  # a rule of CUDA that fake tensors do not check
            indices = args[1] if isinstance(args[1], tuple) else [args[1]]
            devices = {index.device.type for index in indices if isinstance(index, torch.Tensor)}
            assert devices <= {"cpu", args[0].device.type}
        try:
            return function(*args, **kwargs)  # small tensors on the CPU have values
        except (DataDependentOutputException, DynamicOutputShapeException):
            some = {"dtype": torch.int64, "device": args[0].device}
            if name == "nonzero":
                return torch.zeros(2, args[0].ndim, **some)
            if name == "bincount":
                return torch.zeros(kwargs["minlength"], **some)
            return self.truth if name == "__bool__" else {"__int__": 1}.get(name, 1.0)


def move(module, device, memory_format):
    """Module.to, which cannot exchange the values of fake parameters."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = torch.nn.Parameter(parameter.detach().to(device))
        for name, buffer in part._buffers.items():
            part._buffers[name] = buffer.to(device)
    return module


@pytest.fixture(autouse=True)
def answers(monkeypatch):
    # What autocast and train.py ask the GPU itself.
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with FakeTensorMode(allow_non_fake_inputs=True), Answers() as mode:
        yield mode
    _per_row.cache_clear()  # of fake tensors


def make_model(tied=False):
    with CUDA:
        return build_model(build_backbone("test_resnet", stem_stride=2, blurpool=True), 10, DIMS, tied)


def make_images():
    images, labels = torch.zeros(8, 3, 40, 40, dtype=torch.uint8), torch.arange(8)
    transform = Transform(0, (0.5, 1.0), (0.75, 1.33), True, 40, 32, (0.5,) * 3, (0.5,) * 3)
    return MemoryImages(images, labels, DIGIT_CLASSES, transform, CUDA)


def of(tensor):
    return tensor.device.type, tensor.dtype, tuple(tensor.shape)


@pytest.mark.parametrize("tied", ["false", "true"])
def test_the_loop_stays_on_the_gpu(tmp_path, monkeypatch, answers, tied):
    """train.py's own loop, with all that may act on a batch; only files are not written."""
    monkeypatch.setattr(train, "build_data", lambda *_, **__: {"train": make_images(), "val": make_images()})
    checkpoints = []
    monkeypatch.setattr(rundir, "save_checkpoint", lambda _, content: checkpoints.append(content))
    monkeypatch.setattr(train, "save_model", lambda *_: None)
    monkeypatch.setattr(torch.nn.Module, "to", move)
    monkeypatch.setattr(distributed, "agree", lambda _: True)
    monkeypatch.setattr(distributed, "all_reduce_any", lambda *flags: list(flags))
    argv = ["--config", "digits_mrl.yaml", "--run.dir", str(tmp_path), "--data.batch_size", "4", "--train.epochs", "1"]
    argv += ["--model.backbone", "test_resnet", "--model.kwargs", "{}", "--model.stem_stride", "2"]
    argv += [
        "--head.nesting_list",
        "[8, 96]",
        "--head.weights",
        "[1, 2]",
        "--head.tied",
        tied,
        "--head.self_distillation",
        "1",
    ]
    argv += ["--data.random_erasing", "0.5", "--data.mixup", "0.5", "--data.cutmix", "0.5"]
    argv += ["--train.precision", "bf16", "--optim.clip_norm", "1"]
    answers.truth = False  # is a loss infinite?
    assert train.train(parse_command_line(argv, ""), Process(0, 1, CUDA)) == 0
    [content] = checkpoints
    assert {value.device.type for value in content["model"].values()} == {"cuda"}
    assert content["step"] == 2 and of(content["sums"]) == ("cuda", torch.float64, (3, 2))


def test_matryoshka_loss_follows_the_embeddings():
    loss = mrl.MatryoshkaLoss(lambda a, b: (a * b).sum(1).mean(), DIMS, weights=[1, 1, 2, 4])
    z = torch.randn(8, 96, device=CUDA)
    assert of(loss(z, z)) == ("cuda", torch.float32, ())


def test_encode_stays_on_the_gpu():
    assert of(make_model().encode(torch.randn(8, 3, 32, 32, device=CUDA), dim=16)) == ("cuda", torch.float32, (8, 16))


@pytest.mark.parametrize("place", ["cpu", "cuda", "numpy"])
def test_exact_search_computes_on_the_gpu_wherever_the_vectors_are(place):
    """Of blocks of 64 vectors, so that a second block meets the neighbors kept from the first."""
    zeros = np.zeros if place == "numpy" else partial(torch.zeros, device=place)
    queries, database = zeros((5, 32)), zeros((150, 32))
    found = mrl.exact_search(queries, database, k=3, dims=[8, 32], device=CUDA, database_rows=64, query_rows=4)
    assert {dim: (indices.shape, scores.shape) for dim, (indices, scores) in found.items()} == {
        8: ((5, 3), (5, 3)),
        32: ((5, 3), (5, 3)),
    }


def test_classification_of_embeddings_computes_on_the_gpu():
    head = mrl.NestedLinear([8, 32], 10)
    classifiers = head.weights_and_biases()
    vectors = np.zeros((8, 32), np.float32)
    assert predict(vectors, classifiers, vectors, device=CUDA).classes.shape == (2, 8)
