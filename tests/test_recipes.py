import dataclasses

import pytest
import torch

import mrl
from mrl.config import Config
from mrl.errors import UserError
from mrl.recipes import RECIPES, parse_command_line, read_config, to_yaml
from mrl.training.augmentation import make_augmentation
from mrl.training.optimizer import build_optimizer
from train import make_model

FIELDS = """
run: name dir seed resume
data: name root backend num_classes batch_size num_workers train_px crop_scale crop_ratio flip
      rand_augment random_erasing mixup cutmix eval_resize_px eval_px mean std
model: backbone init blurpool stem_stride trainable kwargs
head: nesting_list tied weights
optim: name lr momentum weight_decay layer_decay warmup_epochs schedule clip_norm
train: epochs label_smoothing accumulation_steps precision gradient_precision sync_batchnorm compile ema_decay
       eval_every_epochs checkpoint_minutes log_every_steps profile_steps
wandb: mode project entity
"""


def parse(*words):
    return parse_command_line(list(words), "")


def test_the_fields_are_these_and_a_new_one_is_a_deliberate_change():
    found = {s.name: [f.name for f in dataclasses.fields(s.default_factory)] for s in dataclasses.fields(Config)}
    expected: dict[str, list[str]] = {}
    for word in FIELDS.split():
        if word.endswith(":"):
            section = expected.setdefault(word[:-1], [])
        else:
            section.append(word)
    assert found == expected


def test_every_field_is_explained_in_help(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    lines = capsys.readouterr().out.splitlines()
    for section in dataclasses.fields(Config):
        for field in dataclasses.fields(section.default_factory):
            at = next(i for i, line in enumerate(lines) if line.strip().startswith(f"--{section.name}.{field.name}"))
            text = " ".join(lines[at : at + 4])
            assert len(text.split("(type:")[0].split()) > 3, field.name


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_loads_builds_and_steps_once(path):
    config = parse("--config", path.name, "--data.root", "anywhere")
    assert config.run.name == path.stem
    assert path.read_text().startswith("# ")
    num_classes = config.data.num_classes or 1000
    if "vit" in config.model.backbone:  # its image size is fixed when it is built: make it small
        small = config.model.kwargs | {"img_size": 32}
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, kwargs=small))
    if config.model.init == "pretrained":  # would be downloaded
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, init="scratch"))
    model = make_model(config, num_classes)
    optim = config.optim
    optimizer = build_optimizer(model, optim.name, optim.lr, optim.momentum, optim.weight_decay, optim.layer_decay)
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    images, targets = make_augmentation(config.data, 2, num_classes, torch.device("cpu"))(images, labels)
    before = [p.clone() for p in model.parameters()]
    logits = model(images)
    assert logits.shape == (len(model.head.nesting_list), 2, num_classes)
    mrl.nested_cross_entropy(logits, targets, config.train.label_smoothing).sum().backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    moved = [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
    assert sum(moved) > 0.6 * len(moved)  # not all: residual branches begin with a scale of 0


def test_the_imagenet_resnet_recipes_are_the_papers():
    mrl_config, mrl_e, ff = (parse("--config", f"resnet50_{name}.yaml") for name in ("mrl", "mrl_e", "ff"))
    assert (mrl_config.head.tied, mrl_e.head.tied, ff.head.nesting_list) == (False, True, [2048])
    for config in (mrl_config, mrl_e, ff):
        assert config.model.blurpool and config.model.backbone == "resnet50"
        assert (config.data.batch_size, config.optim.lr, config.train.epochs) == (1024, 0.425, 40)
        assert (config.optim.warmup_epochs, config.optim.weight_decay, config.train.label_smoothing) == (2, 1e-4, 0.1)
        assert config.data.train_px == [(0, 160), (32, 192)]
        assert (config.data.eval_resize_px, config.data.eval_px) == (256, 224)


def test_the_vits_nest_from_a_64th_of_their_width():
    for size, smallest, width in (("b", 12, 768), ("s", 6, 384)):
        for name in (f"vit_{size}16_mrl", f"vit_{size}16_mrl_e"):
            config = parse("--config", name, "--model.kwargs", "{img_size: 32, depth: 1}")
            head = make_model(config, 10).head
            assert head.nesting_list == tuple(smallest * 2**power for power in range(7))
            assert head.nesting_list[-1] == width and head.tied == name.endswith("_e")


def test_later_words_win_over_the_recipe():
    config = parse("--config", "resnet50_ff", "--head.nesting_list", "[64]", "--optim.lr", "0.1")
    assert config.head.nesting_list == [64]
    assert config.optim.lr == 0.1


def test_the_saved_config_reads_back_equal(tmp_path):
    config = parse("--config", "vit_b16_mrl", "--data.root", "x", "--model.trainable", "[blocks.11]")
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert read_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--trian.epochs", "3"], ["trian.epochs", "did you mean train.epochs"]),
        (["--train.epoch", "3"], ["train.epoch", "did you mean train.epochs"]),
        (["--train.epochs", "ten"], ["train.epochs", "int", "ten"]),
        (["--train.epochs", "0"], ["train.epochs is 0", "1 or more"]),
        (["--optim.warmup_epochs", "40"], ["optim.warmup_epochs is 40.0", "below train.epochs = 40"]),
        (["--optim.name", "lion"], ["optim.name", "sgd", "adamw", "lion"]),
        (["--head.nesting_list", "[16, 8]"], ["[16, 8]", "ascending"]),
        (["--head.nesting_list", "[8, 16]", "--head.weights", "[1]"], ["1 loss weights", "[8, 16]"]),
        (["--data.crop_scale", "[0.5, 0.2]"], ["data.crop_scale", "0 < low <= high <= 1"]),
        (["--data.train_px", "[[5, 64]]"], ["data.train_px", "epoch 0"]),
        (["--data.eval_px", "300"], ["data.eval_px is 300", "data.eval_resize_px = 256"]),
        (["--model.stem_stride", "3"], ["model.stem_stride", "4", "2", "1"]),
        (["--data.rand_augment", "rand-9"], ["data.rand_augment is 'rand-9'", "-m9 (magnitude)"]),
        (["--data.rand_augment", "auto"], ["data.rand_augment is 'auto'", "-inc1"]),
        (["--data.random_erasing", "1.5"], ["data.random_erasing is 1.5", "0 to 1"]),
        (["--optim.layer_decay", "0"], ["optim.layer_decay is 0.0", "above 0"]),
        (["--train.gradient_precision", "fp16"], ["train.gradient_precision", "fp32", "bf16"]),
        (["--train.profile_steps", "-1"], ["train.profile_steps is -1", "0 (off) or more"]),
        (["--run.name", "a/b"], ["run.name", "'a/b'"]),
        (["--config", "resnet51"], ["resnet51", "recipes:", "resnet50_mrl"]),
    ],
)
def test_bad_settings_name_the_key_and_what_is_allowed(words, parts):
    with pytest.raises(UserError) as caught:
        parse(*words)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_fault_05_a_key_that_nobody_reads_is_an_error(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("optim:\n  bn_wd: 0\n")
    with pytest.raises(UserError, match="bn_wd"):
        parse("--config", str(recipe))


def test_fault_06_an_unknown_dataset_is_an_error_not_another_dataset():
    with pytest.raises(UserError, match=r"data\.name.*imagenet.*tiny_imagenet.*digits.*folder.*imagenet_v3"):
        parse("--data.name", "imagenet_v3")
