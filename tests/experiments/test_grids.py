import dataclasses

import pytest

from experiments.grids import make_subset, read_grid
from experiments.run_state import RunState, estimated_seconds, list_runs, read_state, work
from mrl.config import to_yaml
from mrl.errors import UserError
from mrl.matryoshka import default_nesting_list

GRID = """
title: Digits
train_images: 1000
images_per_second_at_64_px: 100
set: {train.epochs: 4, data.train_px: [[0, 32], [3, 64]]}
runs:
  - {name: mrl, group: main, recipe: digits_mrl, seeds: [0, 1]}
  - {name: ff, group: main, recipe: digits_ff, seeds: [0, 1], dims: [8, 512]}
  - {name: tuned, group: further, recipe: digits_mrl, seeds: [0], init_from: ff512_seed0}
references: {further: [mrl_seed0]}
"""
NOTHING = RunState("not started", 0.0, {}, None, 0.0)


def grid_of(tmp_path, text=GRID, **rest):
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    return read_grid(str(path), tmp_path / "runs", None, **rest)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("grid")


@pytest.fixture(scope="module")
def grid(folder):
    return grid_of(folder)


def test_a_grid_says_every_run_with_first_seeds_first(grid, folder):
    first = ["mrl_seed0", "ff8_seed0", "ff512_seed0", "tuned_seed0"]
    assert [run.name for run in grid.runs] == [*first, "mrl_seed1", "ff8_seed1", "ff512_seed1"]
    by_name = {run.name: run for run in grid.runs}
    assert by_name["ff8_seed1"].config.head.nesting_list == [8]
    assert (by_name["ff8_seed1"].config.run.seed, by_name["ff8_seed1"].config.train.epochs) == (1, 4)
    assert by_name["tuned_seed0"].needs == "ff512_seed0"
    assert by_name["tuned_seed0"].config.model.init == str(folder / "runs" / "ff512_seed0")
    assert [run.name for run in grid.members("further")] == ["mrl_seed0", "tuned_seed0"]


def test_epochs_and_seeds_can_be_others_to_try_it_out(tmp_path):
    grid = grid_of(tmp_path, epochs=1, seeds=[0])
    assert [run.name for run in grid.runs] == ["mrl_seed0", "ff8_seed0", "ff512_seed0", "tuned_seed0"]
    assert {(run.config.train.epochs, run.config.optim.warmup_epochs) for run in grid.runs} == {(1, 0.25)}
    others = grid_of(tmp_path, seeds=[7])  # without the run that begins with the weights of seed 0
    assert [run.name for run in others.runs] == ["mrl_seed7", "ff8_seed7", "ff512_seed7"]
    assert others.groups == ("main",) and not others.references


@pytest.mark.parametrize("name", ["a", "b"])
def test_the_shipped_grids_have_what_the_effects_need(tmp_path, name):
    grid = read_grid(name, tmp_path, tmp_path / "data")
    main = [run.config for run in grid.runs if run.group == grid.groups[0]]
    kinds: dict[tuple, set[int]] = {}
    for config in main:
        kinds.setdefault((str(config.head.nesting_list), config.head.tied), set()).add(config.run.seed)
    sizes = default_nesting_list(2048) if name == "a" else (8, 64, 2048)
    assert set(kinds) == {("auto", False), ("auto", True), *((f"[{dim}]", False) for dim in sizes)}
    assert set(map(len, kinds.values())) == {3}
    # What is compared differs in nothing else.
    same = [dataclasses.replace(config, run=main[0].run, head=main[0].head) for config in main]
    assert all(config == same[0] for config in same)
    assert grid.superclasses is not None and grid.superclasses.is_file()


def test_a_subset_takes_every_second_class(tmp_path):
    for split in ("train", "val"):
        for name in "abcde":
            (tmp_path / "data" / split / name).mkdir(parents=True)
            (tmp_path / "data" / split / name / "1.JPEG").touch()
    grid = grid_of(tmp_path, GRID + "subset: {name: half, every: 2}\n")
    assert grid.data_root == tmp_path / "runs" / "data" / "half"
    make_subset(grid, tmp_path / "data")
    make_subset(grid, tmp_path / "elsewhere")  # it is there already
    assert sorted(path.name for path in (grid.data_root / "train").iterdir()) == ["a", "c", "e"]
    assert (grid.data_root / "val" / "c" / "1.JPEG").is_file()


def test_the_time_left_goes_by_area_and_by_what_was_measured(grid):
    run = grid.runs[0]
    # Three epochs at a quarter of the area and one at all of it, 1,000 images each.
    assert work(grid, run.config) == 1750
    assert work(grid, run.config, from_epoch=2.5) == 1125
    states = {other.name: NOTHING for other in grid.runs}
    assert estimated_seconds(grid, states)[run.name] == pytest.approx(17.5)
    states[grid.runs[1].name] = RunState("finished", 4, {8: 0.5, 512: 0.75}, 400.0, 35.0)
    found = estimated_seconds(grid, states)
    assert found[run.name] == pytest.approx(35.0)
    assert found[grid.runs[1].name] == 0
    text = list_runs(grid, [run.name, grid.runs[1].name], states)
    assert "50.0% @8, 75.0% @512" in text and "2 runs; about 35 s of training left" in text
    unknown = dataclasses.replace(grid, images_per_second_at_64_px=None)
    assert "1 runs of unknown length" in list_runs(unknown, [run.name], {name: NOTHING for name in states})


def test_a_run_with_other_settings_is_refused(grid):
    run = grid.runs[0]
    before = dataclasses.replace(run.config, train=dataclasses.replace(run.config.train, epochs=2))
    run.directory.mkdir(parents=True)
    (run.directory / "config.yaml").write_text(to_yaml(before))
    assert read_state(dataclasses.replace(run, config=before)).word == "started"
    with pytest.raises(UserError, match=r"other settings \(train\.epochs was 2, now 4\).*another --runs"):
        read_state(run)


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("title: Digits", "titel: Digits", ["titel", "title"]),
        ("seeds: [0, 1]}", "seed: [0, 1]}", ["seed", "seeds"]),
        ("init_from: ff512_seed0", "init_from: ff512_seed1", ["tuned_seed0", "ff512_seed1", "no run before it"]),
        ("name: tuned,", "name: mrl,", ["several runs are called mrl_seed0"]),
        ("train.epochs: 4", "train.epoch: 4", ["run mrl_seed0", "train.epoch", "did you mean train.epochs"]),
        ("{further: [mrl_seed0]}", "{further: [mrl]}", ["references", "mrl"]),
        ("title: Digits", "title: {", ["not YAML"]),
    ],
)
def test_a_grid_that_is_wrong_says_where(tmp_path, old, new, parts):
    assert old in GRID
    with pytest.raises(UserError) as caught:
        grid_of(tmp_path, GRID.replace(old, new))
    for part in parts:
        assert part in str(caught.value)


def test_a_grid_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="--grid 'c' is not a file; allowed: a, b"):
        read_grid("c", tmp_path, None)
