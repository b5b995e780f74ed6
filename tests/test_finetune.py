"""Nested heads on a fixed-feature model that was trained before (paper, table 26), on handwritten digits."""

import pytest
import torch

import mrl
import train
from mrl.model import build_backbone, build_model, freeze

SMALL = ["--model.kwargs", '{"channels": [8, 16, 32, 64], "stem_width": 8}', "--optim.warmup_epochs", "0.5"]
SMALL += ["--optim.lr", "0.1"]
DIMS = [8, 16, 32, 64]


def run(directory, name, *words):
    assert train.main([*words, *SMALL, "--run.dir", str(directory), "--run.name", name]) == 0
    return mrl.load(directory / name)


@pytest.fixture(scope="module")
def fixed_feature(tmp_path_factory):
    """The folder of a run "ff" at full width, trained until it reads most digits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        folder = tmp_path_factory.mktemp("runs")
        run(folder, "ff", "--config", "digits_ff.yaml", "--head.nesting_list", "[64]", "--train.epochs", "4")
        yield folder


def finetune(folder, trainable, epochs=1):
    """The fine-tuned model of a run named after what it trains."""
    words = ["--config", "digits_mrl.yaml", "--head.nesting_list", "auto", "--model.init", str(folder / "ff")]
    words += ["--model.trainable", trainable]
    return run(folder, trainable, *words, "--train.epochs", str(epochs))


def moved(folder, model):
    """Names in the backbone, buffers too, that are not as they were in the run "ff"."""
    before = mrl.load(folder / "ff").backbone.state_dict()
    return {key for key, value in model.backbone.state_dict().items() if not torch.equal(value, before[key])}


def accuracies(folder, logits_of):
    data = train.parse_command_line(["--config", "digits_ff.yaml"], "").data
    images = train.build_data(data, 0, torch.device("cpu"), False)["val"]
    [(batch, labels)] = images.eval_batches([list(range(len(images)))])
    with torch.no_grad():
        return [float((logits.argmax(1) == labels).float().mean()) for logits in logits_of(batch)]


def test_new_heads_on_a_frozen_backbone_beat_its_truncation(fixed_feature):
    ff = mrl.load(fixed_feature / "ff")
    weight, bias = ff.head.weights_and_biases()[0]

    def truncated(images):
        z = ff.embed(images)
        return [z[:, :dim] @ weight[:, :dim].T + bias for dim in DIMS]

    model = finetune(fixed_feature, "head", epochs=3)
    before, after = accuracies(fixed_feature, truncated), accuracies(fixed_feature, model)
    assert list(model.head.nesting_list) == DIMS
    assert after[0] > before[0] + 0.1 and after[1] > before[1] + 0.1
    assert after[-1] > before[-1] - 0.03
    assert moved(fixed_feature, model) == set()


def test_a_block_trains_with_its_batchnorms_and_no_other_moves(fixed_feature):
    model = finetune(fixed_feature, "[layer4]")
    of_block = {key for key in model.backbone.state_dict() if key.startswith("layer4.")}
    assert {key for key in of_block if "running" in key} <= moved(fixed_feature, model) <= of_block
    assert {key for key in of_block if key.endswith("weight")} <= moved(fixed_feature, model)


def bytes_kept_for_backward(trainable):
    model = build_model(build_backbone("resnet10t"), 10)
    freeze(model, trainable)
    model.train()
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(torch.randn(8, 3, 64, 64))
    assert logits.requires_grad
    return sum(size for pointer, size in kept.items() if pointer not in parameters)


def test_frozen_parts_keep_nothing_in_memory_for_a_backward_pass():
    everything, block, head = (bytes_kept_for_backward(trainable) for trainable in ("all", ["layer4"], "head"))
    assert head == 8 * 512 * 4  # the embeddings, once
    assert head < block < 0.2 * everything
