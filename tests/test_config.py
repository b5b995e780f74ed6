import copy
import dataclasses
import functools
import importlib.util
import json
import os
import re
import subprocess

import pytest
import torch

import eval as eval_script
import mrl
import train
from mrl.config import RECIPES, Config, parse_command_line, read_config, to_yaml
from mrl.errors import UserError
from mrl.matryoshka import check_weights
from mrl.model import build_backbone, build_model, save_model
from mrl.training.augmentation import make_augmentation
from mrl.training.optim import build_optimizer
from train import describe, make_model

ROOT = RECIPES.parent
FIELDS = """
run: name dir seed resume
data: name root val_share backend num_classes missing_classes max_unreadable exif_rotation batch_size
      min_steps_per_epoch num_workers train_px crop_scale crop_ratio flip
      rand_augment random_erasing mixup cutmix eval_resize_px eval_px interpolation mean std
model: backbone init blurpool stem_stride trainable projection kwargs
head: nesting_list tied scaled weights self_distillation
optim: name lr momentum weight_decay layer_decay warmup_epochs schedule clip_norm
train: epochs label_smoothing accumulation_steps precision gradient_precision sync_batchnorm cache_views cache_seed
       compile ema_decay eval_every_epochs checkpoint_minutes log_every_steps profile_steps
wandb: mode project entity
"""


@functools.cache
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


def test_help_explains_every_field_and_keeps_the_lines_of_the_examples(capsys):
    with pytest.raises(SystemExit):
        parse_command_line(["--help"], str(train.__doc__))
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    examples = [line.partition("#")[0].strip() for line in lines[:8] if "train.py --config" in line]
    assert examples == [
        "python train.py --config digits_mrl.yaml",
        "python train.py --config finetune_mrl_cpu.yaml --data.root DIR",
        "torchrun --nproc_per_node=8 train.py --config resnet50_mrl.yaml --data.root DIR",
    ]
    for section in dataclasses.fields(Config):
        for field in dataclasses.fields(section.default_factory):
            at = next(i for i, line in enumerate(lines) if line.startswith(f"--{section.name}.{field.name}"))
            text = " ".join(lines[at : at + 4])
            assert len(text.split("(type:")[0].split()) > 3, field.name


@functools.cache
def backbone(settings):
    return build_backbone(*json.loads(settings))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The run directory of a ResNet-50 with BlurPool that stands in for one trained before."""
    config = parse("--config", "resnet50_ff.yaml")
    model = build_model(build_backbone("resnet50", blurpool=True), 1000, config.head.nesting_list)
    directory = tmp_path_factory.mktemp("runs") / "trained"
    directory.mkdir()
    save_model(model, describe(config, model, [str(number) for number in range(1000)]), directory)
    return directory


@pytest.fixture
def build(monkeypatch, trained):
    """Build the model of a config with small images."""
    # Each backbone is built once and copied; the weights of others are stood in for.
    monkeypatch.setattr(train, "build_backbone", lambda *args: copy.deepcopy(backbone(json.dumps(args))))

    def build(config):
        changes = {}
        if "vit" in config.model.backbone:  # its image size is fixed when it is built: make it small
            changes["kwargs"] = config.model.kwargs | {"img_size": 32}
        if config.model.init != "scratch":
            is_run = not config.model.init.endswith(("pretrained", ".safetensors"))
            changes["init"] = str(trained) if is_run else "scratch"
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))
        return make_model(config, config.data.num_classes or 1000)

    return build


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_loads_builds_and_steps_once(path, build):
    """What it trains moves, what not does not."""
    config = parse("--config", path.name, "--data.root", "anywhere")
    assert config.run.name == path.stem
    assert path.read_text().startswith("# ")
    model, optim = build(config), config.optim
    optimizer = build_optimizer(model, optim.name, optim.lr, optim.momentum, optim.weight_decay, optim.layer_decay)
    num_classes, cpu = model.head.num_classes, torch.device("cpu")
    augment = make_augmentation(config.data, 2, num_classes, cpu)
    images, targets = augment(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))
    before = [p.detach().clone() for p in model.parameters()]
    logits = model(images)
    assert logits.shape == (len(model.head.nesting_list), 2, num_classes)
    losses = mrl.nested_cross_entropy(logits, targets, config.train.label_smoothing)
    (losses * torch.tensor(check_weights(config.head.weights, model.head.nesting_list))).sum().backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    moved = [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
    trains = [p.requires_grad for p in model.parameters()]
    assert not any(m for m, t in zip(moved, trains, strict=True) if not t)
    assert sum(moved) > 0.6 * sum(trains)  # not all: residual branches begin with a scale of 0


def commands(document):
    """The words of every python and torchrun command in a document's code blocks, as a shell reads them."""
    blocks = re.findall(r"^```\n(.*?)^```", (RECIPES.parent / document).read_text(), re.MULTILINE | re.DOTALL)
    show = 'python() { printf \'%s\\037\' "$@"; echo; }; torchrun() { python "$@"; }; set -e\n'
    done = subprocess.run(["bash", "-c", show + "\n".join(blocks)], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return [line.split("\037")[:-1] for line in done.stdout.splitlines()]


@functools.cache
def documented():
    """The commands of REPRODUCING.md, and the arguments of those of train.py."""
    found = commands("docs/REPRODUCING.md")
    return found, [words[words.index("train.py") + 1 :] for words in found if "train.py" in words]


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda path: path.name
)
def test_every_documented_option_exists(path):
    sections = dataclasses.fields(Config)
    known = {f"{s.name}.{f.name}" for s in sections for f in dataclasses.fields(s.default_factory)} | {"config", "help"}
    text = path.read_text().replace("\\\n", " ")
    for name, rest in re.findall(r"python (?:-m )?([\w./]+)([^\n`#|]*)", text):
        source = (ROOT / (name if name.endswith(".py") else f"{name.replace('.', '/')}.py")).read_text()
        for option in re.findall(r"--([\w.]+)", rest):
            assert option in known or f'"--{option}"' in source, (name, option)


def test_every_documented_command_is_understood_and_its_model_built(build):
    for words in documented()[1]:
        assert build(parse(*words)).head.nesting_list
    for words in documented()[0]:
        if words[0] == "-m":
            assert importlib.util.find_spec(words[1])
        else:
            assert "train.py" in words or eval_script.parse(words[words.index("eval.py") + 1 :])


def test_the_documented_commands_are_the_papers_ablations():
    configs = [parse(*words) for words in documented()[1]]
    assert len({config.run.name for config in configs}) == len(configs), "one would refuse the directory of another"
    lists = [config.head.nesting_list for config in configs]
    doubling = [8, 16, 32, 64, 128, 256, 512, 1024, 2048]
    assert all([dim] in lists for dim in doubling), "FF at each size"
    assert [4, *doubling] in lists and [6, *doubling] in lists
    assert [8, *range(212, 2048, 204), 2048] in lists, "uniform"
    weights = [config.head.weights for config in configs if config.head.weights]
    assert weights == [[2] + [1] * 8, [2, 1.5] + [1] * 7]
    trainable = [config.model.trainable for config in configs if config.model.init == "runs/resnet50_ff"]
    assert trainable == ["head", ["layer4.2.conv3"], ["layer4.2.conv2", "layer4.2.conv3"], ["layer4.2"], "all"]


def test_the_imagenet_resnet_recipes_are_the_papers():
    mrl_config, mrl_e, ff = (parse("--config", f"resnet50_{name}.yaml") for name in ("mrl", "mrl_e", "ff"))
    assert (mrl_config.head.tied, mrl_e.head.tied, ff.head.nesting_list) == (False, True, [2048])
    for config in (mrl_config, mrl_e, ff):
        assert config.model.blurpool and config.model.backbone == "resnet50"
        assert (config.data.batch_size, config.optim.lr, config.train.epochs) == (1024, 0.425, 40)
        assert (config.optim.warmup_epochs, config.optim.weight_decay, config.train.label_smoothing) == (2, 1e-4, 0.1)
        assert config.data.train_px == [(0, 160), (32, 192)]
        assert (config.data.eval_resize_px, config.data.eval_px) == (256, 224)


def test_images_are_resized_in_proportion_to_the_crop_unless_given():
    for words, resized in ((["112"], 128), (["300"], 343), (["112", "--data.eval_resize_px", "200"], 200)):
        assert parse("--config", "resnet50_mrl", "--data.eval_px", *words).data.eval_resize_px == resized


def test_the_vits_nest_from_a_64th_of_their_width():
    for size, smallest, width in (("b", 12, 768), ("s", 6, 384)):
        for name in (f"vit_{size}16_mrl", f"vit_{size}16_mrl_e"):
            config = parse("--config", name, "--model.kwargs", "{img_size: 32, depth: 1}")
            head = make_model(config, 10).head
            assert head.nesting_list == tuple(smallest * 2**power for power in range(7))
            assert head.nesting_list[-1] == width and head.tied == name.endswith("_e")


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
        (["--optim.name", "lion"], ["optim.name", "sgd", "adamw", "lion"]),
        (["--head.nesting_list", "[16, 8]"], ["[16, 8]", "ascending"]),
        (["--head.nesting_list", "[8, 16]", "--head.weights", "[1]"], ["1 loss weights", "[8, 16]"]),
        (["--head.scaled", "true"], ["head.scaled is True", "unless head.tied"]),
        (["--head.self_distillation", "-1"], ["head.self_distillation is -1", "0 or more"]),
        (["--data.crop_scale", "[0.5, 0.2]"], ["data.crop_scale", "0 < low <= high <= 1"]),
        (["--data.train_px", "[[5, 64]]"], ["data.train_px", "epoch 0"]),
        (
            ["--data.eval_px", "300", "--data.eval_resize_px", "256"],
            ["data.eval_px is 300", "data.eval_resize_px = 256"],
        ),
        (["--model.stem_stride", "3"], ["model.stem_stride", "4", "2", "1"]),
        (["--data.rand_augment", "rand-9"], ["data.rand_augment is 'rand-9'", "-m9 (magnitude)"]),
        (["--data.rand_augment", "rand-p.5"], ["data.rand_augment is 'rand-p.5'"]),
        (["--run.name", ".."], ["run.name is '..'"]),
        (["--train.cache_seed", "-1"], ["train.cache_seed is -1", "0 or more"]),
        (["--data.rand_augment", "auto"], ["data.rand_augment is 'auto'", "-inc1"]),
        (["--data.random_erasing", "1.5"], ["data.random_erasing is 1.5", "0 to 1"]),
        (["--optim.layer_decay", "0"], ["optim.layer_decay is 0.0", "above 0"]),
        (["--train.gradient_precision", "fp16"], ["train.gradient_precision", "fp32", "bf16"]),
        (["--train.profile_steps", "-1"], ["train.profile_steps is -1", "0 or more"]),
        (["--data.max_unreadable", "1"], ["data.max_unreadable is 1.0; allowed: 0 to below 1"]),
        (["--data.mean", "[123.7, 116.3, 103.5]"], ["data.mean is", "numbers from 0 to 1 (white is 1, not 255)"]),
        (["--data.std", "[0.2, 0, 0.2]"], ["data.std is", "numbers above 0, up to 1"]),
        (["--data.root", ""], ["data.root is ''; allowed: the folder that holds train/ and val/"]),
        (["--optim.lr", ".nan"], ["optim.lr is nan; allowed: above 0"]),
        (["--optim.lr", ".inf"], ["optim.lr is inf; allowed: finite numbers"]),
        (["--optim.weight_decay", ".inf"], ["optim.weight_decay is inf; allowed: finite numbers"]),
        (["--data.crop_ratio", "[0.5, .inf]"], ["data.crop_ratio is (0.5, inf); allowed: finite numbers"]),
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


@pytest.mark.parametrize("key", ["data.root", "run.dir", "run.name"])
def test_a_path_that_config_yaml_cannot_hold_is_refused_and_others_come_back(tmp_path, key):
    with pytest.raises(UserError, match=rf"{key} is '.*udce9'; .*ln -s"):
        parse(f"--{key}", os.fsdecode(b"caf\xe9"))
    config = parse(f"--{key}", "caf\u00e9 \U0001f408")
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert read_config(tmp_path / "config.yaml") == config
