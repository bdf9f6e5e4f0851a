"""The shipped configs, how a config is read and overridden, the dry run, and what mistakes cost."""

import dataclasses
import functools
import os
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
import yaml

import convert
import model as m
import tp
import train
from configs import check, estimate, recompute, schema

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
RELEASED = "checkpoints/nvidia/Cosmos-Transfer1-7B-Sample-AV"
SIGMA_8 = 2.8284271247461903  # sqrt(8), 57 frames


@dataclasses.dataclass
class Expected:
    """What is known of a released model and of its training."""
    name: str
    base: str
    control: str
    latent: tuple
    tokens: int
    sigma: float
    base_parameters: int
    control_parameters: int


def single_view(hint, frames=121):
    latent, tokens, sigma = {121: ((16, 16, 88, 160), 56_320, 4.0),
                             57: ((16, 8, 88, 160), 28_160, SIGMA_8)}[frames]
    return Expected(f"CTRL_7Bv1pt3_t2w_{frames}frames_control_input_{hint}_block3",
                    f"{RELEASED}/base_model.pt", f"{RELEASED}/{hint}_control.pt",
                    latent, tokens, sigma, 7_236_192_256, 891_645_728)


def multi_view(mode, hint):
    folder = f"{RELEASED}-Single2MultiView"
    return Expected(f"CTRL_7Bv1pt3_{mode}_sv2mv_57frames_control_input_{hint}_block3",
                    f"{folder}/{mode}_base_model.pt", f"{folder}/{mode}_{hint}_control.pt",
                    (16, 24, 88, 160), 84_480, SIGMA_8, 7_234_799_670, 890_253_142)


MODELS = {"lidar": single_view("lidar"), "hdmap": single_view("hdmap")}
MODELS |= {f"mv_{mode}_{hint}": multi_view(mode, hint)
           for mode in ("t2w", "v2w") for hint in ("lidar", "hdmap")}
TWINS = ("", "_posttrain")
CASES = [(f"{name}{twin}", (), expected) for name, expected in MODELS.items() for twin in TWINS]
CASES += [(f"{hint}{twin}", ("data.num_frames=57",), single_view(hint, 57))
          for hint in ("lidar", "hdmap") for twin in TWINS]
every_config = pytest.mark.parametrize("name, overrides, expected", CASES,
                                       ids=[" ".join([c[0], *c[1]]) for c in CASES])


def load(name="lidar", *overrides):
    return train.load_config(CONFIGS / f"{name}.yaml", overrides)


@functools.cache
def full_model(sizes):
    return m_build(m.ModelConfig(*sizes), "meta", torch.bfloat16)


m_build = m.build


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    """OUTPUT_ROOT in a temporary folder; the current one is another, so that no file is found."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path / "runs"))
    return tmp_path / "runs"


# ---- the twelve configs and the 57-frame variants ------------------------------------------------


@every_config
def test_names_paths_and_shapes(name, overrides, expected):
    cfg = load(name, *overrides)
    stage = "posttrain" if name.endswith("_posttrain") else "pretrain"
    assert cfg.run_dir.parts[-3:] == (f"cosmos_transfer1_{stage}", "CTRL_7Bv1_sampleAV",
                                      f"{expected.name}_{stage}")
    assert cfg.checkpoint.base_path == expected.base
    assert cfg.checkpoint.load_path == (expected.control if stage == "posttrain" else None)
    assert cfg.tokenizer.path == "checkpoints/nvidia/Cosmos-Tokenize1-CV8x8x8-720p"
    assert cfg.data.root == "datasets/waymo_transfer1"
    assert (cfg.latent_shape, cfg.tokens) == (expected.latent, expected.tokens)
    assert cfg.parallel.tp == 8 and cfg.data.batch_size == 1


@every_config
def test_sigma_multiplier(name, overrides, expected):
    cfg = load(name, *overrides)
    views = cfg.data.views

    def draw(frames):
        shape = (16, frames, 2, 2)
        return m.draw_noise(cfg.model, shape, 3, 5, [0, 1], torch.device("cpu")).sigma

    ratio = draw(expected.latent[1]) / draw(views)  # against T = 1
    assert torch.allclose(ratio, torch.full((2,), expected.sigma))


def differing(one, other):
    return {f"{section}.{key}" for section, values in one.items() for key in values
            if values[key] != other[section][key]}


def test_the_complete_config_holds_every_key_at_its_default():
    tree = yaml.safe_load((CONFIGS / "lidar.yaml").read_text())
    keys = {f"{s}.{k}" for s, values in tree.items() for k in values}
    known = {f"{section.name}.{key.name}" for section in dataclasses.fields(schema.Config)
             for key in dataclasses.fields(section.type)}
    assert known - keys == {"model.n_views"}  # follows from data.views
    written, default = dataclasses.asdict(load()), dataclasses.asdict(schema.Config())
    assert differing(written, default) == {
        "job.project", "job.name", "model.n_views", "data.root", "data.hint", "parallel.tp",
        "checkpoint.base_path"}


def test_optimization_defaults():  # those of the released trainings
    cfg = load("mv_v2w_hdmap_posttrain")
    opt = cfg.optimizer
    assert (opt.lr, opt.betas, opt.eps, opt.weight_decay) == (2**-14.3, [0.9, 0.99], 1e-10, 0.1)
    assert (opt.warmup_steps, opt.clip_norm, opt.ema_rate) == (1000, 1.0, 0.1)
    assert (cfg.trainer.max_iter, cfg.trainer.logging_iter) == (999_999_999, 200)
    assert cfg.checkpoint.save_iter == 1000 and cfg.trainer.precision == "bfloat16"


def test_twins_differ_from_what_they_continue_only_in_where_they_start():
    for name in MODELS:
        first, second = load(name), load(f"{name}_posttrain")
        differ = differing(dataclasses.asdict(first), dataclasses.asdict(second))
        assert differ == {"job.stage", "job.project", "job.name", "checkpoint.load_path"}, name
        assert len((CONFIGS / f"{name}_posttrain.yaml").read_text().splitlines()) < 10


@pytest.mark.parametrize("name", [f"{name}{twin}" for name in MODELS for twin in TWINS])
def test_readme_downloads_what_a_config_names_to_where_it_looks(name):
    cfg, readme = load(name), (ROOT / "README.md").read_text()
    files = [cfg.checkpoint.base_path, cfg.checkpoint.load_path]
    paths = [Path(file) for file in files if file]
    row = next(row for row in readme.splitlines() if row.startswith("|") and f"`{name}`" in row
               and "download" in row.split("|")[2] or f"`{name}`" in row and "the same" in row)
    assert all(f"{path.name}" in row for path in paths)
    for folder in {path.parent for path in paths} | {Path(cfg.tokenizer.path)}:
        assert f"hf download nvidia/{folder.name} " in readme and f"--local-dir {folder}" in readme


def test_every_config_is_there_and_loads():
    twelve = {f"{name}{twin}" for name in MODELS for twin in ("", "_posttrain")}
    found = {path.stem for path in CONFIGS.glob("*.yaml")}
    assert found >= twelve | {"smoke", "bench"}
    for name in found:  # a fork's own among them
        load(name)


# ---- reading and overriding ----------------------------------------------------------------------


@pytest.mark.parametrize("override, section, key, value", [
    ("optimizer.eps=1e-10", "optimizer", "eps", 1e-10),  # a string to YAML 1.1
    ("optimizer.lr=1", "optimizer", "lr", 1.0),
    ("optimizer.betas=[0.8, 1e-1]", "optimizer", "betas", [0.8, 0.1]),
    ("trainer.max_iter=10", "trainer", "max_iter", 10),
    ("trainer.tensorboard=true", "trainer", "tensorboard", True),
    ("data.cache=null", "data", "cache", None),
    ("data.cache=a/b=c", "data", "cache", "a/b=c"),
    ("job.name='57'", "job", "name", "57"),
])
def test_overrides_are_yaml(override, section, key, value):
    got = getattr(getattr(load("lidar", override), section), key)
    assert got == value and type(got) is type(value)


def test_the_last_override_wins_and_derived_values_follow():
    cfg = load("lidar", "data.num_frames=33", "data.num_frames=57", "data.height=256",
               "data.width=320", "data.hint=hdmap", "data.views=2", "model.conditioning=v2w")
    assert cfg.latent_shape == (16, 16, 32, 40) and cfg.tokens == 16 * 16 * 20
    assert cfg.model.n_views == 2
    assert cfg.job.name == "CTRL_7Bv1pt3_v2w_sv2mv_57frames_control_input_hdmap_block3_pretrain"


@pytest.mark.parametrize("override, message", [
    ("trainer.max_iter=ten", r"trainer\.max_iter must be int, not 'ten'"),
    ("trainer.max_iter=1.5", r"trainer\.max_iter must be int, not 1\.5"),
    ("trainer.max_iter=true", "must be int, not True"),
    ("trainer.max_iter=null", "must be int, not None"),
    ("trainer.tensorboard=1", "must be bool, not 1"),
    ("optimizer.lr=fast", "must be float, not 'fast'"),
    ("optimizer.lr=true", "must be float, not True"),
    ("optimizer.lr=[1]", r"must be float, not \[1\]"),
    ("optimizer.betas=0.9", r"must be list.*, not 0\.9"),
    ("optimizer.betas=[a, b]", "must be float, not 'a'"),
    ("job.name=57", "must be str or null, not 57"),
    ("trainer.max_itre=5", r"no config key trainer\.max_itre; did you mean trainer\.max_iter\?"),
    ("trianer.seed=5", r"no config key trianer\.seed; did you mean trainer\.seed\?"),
    ("data.tp=2", r"no config key data\.tp; did you mean parallel\.tp\?"),
    ("tp=2", r"'tp=2' must look like section\.key=value"),
    ("data.num_frames", r"'data\.num_frames' must look like"),
    ("data.root.x=1", r"no config key data\.root\.x; did you mean data\.root\?"),
])
def test_overrides_that_are_refused(override, message):
    with pytest.raises(ValueError, match=message) as error:
        load("lidar", override)
    assert "\n" not in str(error.value)


def test_inheritance_reaches_through_folders_and_overlays_single_keys(tmp_path):
    (tmp_path / "a").mkdir()
    folder = tmp_path / "a"
    (folder / "base.yaml").write_text("data:\n  root: r\n  hint: lidar\n  views: 3\n"
                                      "model:\n  conditioning: t2w\ncheckpoint:\n  base_path: b\n")
    (folder / "middle.yaml").write_text("base: base.yaml\n"
                                        "data:\n  hint: hdmap\n  num_frames: 57\n")
    (tmp_path / "top.yaml").write_text("base: a/middle.yaml\ndata:\n  num_frames: 17\n")
    d = train.load_config(tmp_path / "top.yaml").data
    assert (d.root, d.hint, d.views, d.num_frames) == ("r", "hdmap", 3, 17)


@pytest.mark.parametrize("text, message", [
    ("data:\n  hint: lidar\n", r"lacks the key data\.root"),
    ("data:\n  root: r\n  hint: lidar\n", r"lacks the key checkpoint\.base_path"),
    ("datas:\n  root: r\n", r"no config key datas\.root; did you mean data\.root\?"),
    ("lr: 1\n", r"section 'lr' must hold keys, it holds 1"),
    ("- a\n", "must hold sections"),
    ("data: [\n", "is not valid YAML"),
])
def test_broken_files_are_refused(tmp_path, text, message):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        train.load_config(tmp_path / "x.yaml")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", [None, "base: nowhere.yaml\n"])
def test_config_files_that_are_not_there(tmp_path, text):
    if text:
        (tmp_path / "x.yaml").write_text(text)
    told = "no config file .*(x|nowhere).yaml; the configs are in configs/"
    with pytest.raises(FileNotFoundError, match=told):
        train.load_config(tmp_path / "x.yaml")


def written(folder, text, name="x.yaml", base=CONFIGS / "smoke.yaml"):
    """A config file over the smoke run's, or over none."""
    content = text if isinstance(text, bytes) else text.encode()
    (folder / name).write_bytes((f"base: {base}\n".encode() if base else b"") + content)
    return folder / name


def sentence(*arguments):
    """The message with which load_config refuses, within a second."""
    start = time.process_time()
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        schema.load_config(*arguments)
    assert time.process_time() - start < 1
    message = str(error.value)
    assert "\n" not in message and len(message) < 500, message
    return message


@pytest.mark.parametrize("text, told", [
    ("trainer:\n  max_iter: 10\n  seed: 7\n  max_iter: 20\n",
     "max_iter stands twice, in lines 3 and 5"),
    ("optimizer:\n  lr: 5e-5\ndata:\n  num_frames: 9\noptimizer:\n  warmup_steps: 5\n",
     "optimizer stands twice, in lines 2 and 6"),
    ("trainer:\n  'seed': 1\n  \"seed\": 2\n", "seed stands twice, in lines 3 and 4"),
    ("data: {root: a, root: b}\n", "root stands twice, in lines 2 and 2"),
    ("base: other.yaml\n", "base stands twice, in lines 1 and 2"),
])
def test_what_stands_twice_is_named_with_both_lines(tmp_path, text, told):
    assert told in sentence(written(tmp_path, text))


NUMBERS = {"1E-4": 1e-4, "1e-4": 1e-4, ".5e-3": 5e-4, "+1e-1": 0.1, "1.E-2": 0.01, "1": 1.0,
           "2.5E-1": 0.25, "0.001": 0.001, "+.5": 0.5}


@pytest.mark.parametrize("text, value", NUMBERS.items(), ids=NUMBERS)
def test_numbers_are_those_of_yaml_1_2(tmp_path, text, value):
    beta = text if value < 1 else "0"
    path = written(tmp_path, f"optimizer:\n  lr: {text}\n  betas: [{beta}, .9]\n"
                             "trainer:\n  max_iter: 1e3\n")
    for cfg in (schema.load_config(path), load("smoke", f"optimizer.lr={text}")):
        assert cfg.optimizer.lr == value and type(cfg.optimizer.lr) is float
    cfg = schema.load_config(path)
    assert cfg.trainer.max_iter == 1000 and type(cfg.trainer.max_iter) is int
    if value < 1:
        assert cfg.optimizer.betas == [value, 0.9]


@pytest.mark.parametrize("name", ["1e3", "1E-4", "2024-01-01", "007", ".5", "null", "true", "~"])
def test_text_that_looks_like_something_else_is_written_so_that_it_comes_back(tmp_path, name):
    path = written(tmp_path, f"job:\n  name: '{name}'\n")
    cfg = schema.load_config(path)
    assert cfg.job.name == name
    assert schema.load_config(written(tmp_path, schema.dump(cfg), "again.yaml", base=None)) == cfg


PATH_KEYS = ("data.root", "data.cache", "tokenizer.path", "checkpoint.base_path")


def test_home_and_variables_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("SCRATCH", "/scratch")
    for key in PATH_KEYS:
        for text, path in (("~/x", "/home/somebody/x"), ("$SCRATCH/x", "/scratch/x"),
                           ("${SCRATCH}/a/~", "/scratch/a/~"), ("random", "random")):
            assert load("smoke", f"{key}={text}").flat()[key] == path
        assert f"{key} is $NOWHERE/x, but $NOWHERE is not set" in sentence(
            CONFIGS / "smoke.yaml", [f"{key}=$NOWHERE/x"])
        assert f"{key} is empty" in sentence(CONFIGS / "smoke.yaml", [f"{key}=''"])
        assert "too long" in sentence(CONFIGS / "smoke.yaml", [f"{key}={'x' * 5000}"])
    posttrain = ["job.stage=posttrain", "checkpoint.load_path=~/x"]
    assert load("smoke", *posttrain).checkpoint.load_path == "/home/somebody/x"
    monkeypatch.setenv("OUTPUT_ROOT", "~/$HOME")
    assert load("smoke").run_dir.parts[:3] == ("/", "home", "somebody")
    monkeypatch.setenv("HOME", str(tmp_path))
    written(tmp_path, "", "mine.yaml")
    (tmp_path / "other.yaml").write_text("base: ~/mine.yaml\n")
    assert schema.load_config(tmp_path / "other.yaml") == schema.load_config("~/mine.yaml")


def test_what_ships_with_the_repository_is_found_from_any_folder(outputs):
    assert not Path("configs").exists()
    cfg = schema.load_config("configs/smoke.yaml")
    assert Path(cfg.tokenizer.path).is_file()
    Path("configs").mkdir()
    Path("configs", Path(cfg.tokenizer.path).name).touch()  # the current folder comes first
    assert schema.load_config("configs/smoke.yaml").tokenizer.path.startswith("configs/")
    Path("configs/smoke.yaml").write_text("data: 1\n")
    assert "config section 'data'" in sentence("configs/smoke.yaml")


def test_the_smoke_run_starts_from_any_folder(outputs):
    command = [sys.executable, str(ROOT / "train.py"), str(CONFIGS / "smoke.yaml"), "--dryrun"]
    environment = {**os.environ, "OUTPUT_ROOT": str(outputs)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "MISSING" not in done.stdout, done.stderr


def test_a_config_that_is_its_own_base(tmp_path):
    (tmp_path / "self.yaml").write_text("base: self.yaml\n")
    assert "self.yaml is its own base" in sentence(tmp_path / "self.yaml")
    for name, base in ("a", "b"), ("b", "c"), ("c", "./a"):
        (tmp_path / f"{name}.yaml").write_text(f"base: {base}.yaml\n")
    message = sentence(tmp_path / "a.yaml")
    assert "a.yaml is its own base, by way of" in message and "c.yaml" in message


@pytest.mark.parametrize("content", ["# gro\xdf\n".encode("latin-1"), "data: 1\n".encode("utf-16")])
def test_a_file_that_is_not_utf_8(tmp_path, content):
    message = sentence(written(tmp_path, content))
    assert "x.yaml is not UTF-8 in line 2" in message


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    (tmp_path / "x.yaml").write_bytes(f"base: {CONFIGS}/smoke.yaml\n".encode("utf-8-sig"))
    assert schema.load_config(tmp_path / "x.yaml") == load("smoke")


def test_a_config_without_its_suffix(tmp_path):
    assert f"did you mean {CONFIGS / 'lidar.yaml'}?" in sentence(CONFIGS / "lidar")
    assert "no config file" in sentence(CONFIGS)  # a folder


BOMB = "".join(f"  {c}: &{c} [{', '.join([f'*{p}'] * 9)}]\n" for p, c in zip("abcdefg", "bcdefgh"))


@pytest.mark.parametrize("text, told", [
    ("data:\n  a: &a [x, x, x, x, x, x, x, x, x]\n" + BOMB, "line 4 refers to an anchor"),
    ("data:\n  root: &a [*a]\n", "line 3 refers to an anchor"),
    ("data:\n  root: " + "[" * 3000 + "]" * 3000, "brackets"),
    ("".join(f"{' ' * i}a:\n" for i in range(3000)), "line 11 is nested 10 deep"),
    ("optimizer:\n", "section 'optimizer' must hold keys, it holds None"),
    ("optimizer: [1]\n", "section 'optimizer' must hold keys"),
    ("optimizer:\nlr: 1e-4\n", "section 'optimizer' must hold keys"),
    ("data:\n  root: {a: b}\n", "data.root must be str, not {'a': 'b'}"),
    ("1: {2: 3}\n", "no config key 1.2"),
    ("null: {a: 1}\n", "no config key None.a"),
    ("? [a]\n: b\n", "not valid YAML"),
    ("--- \na: 1\n", "not valid YAML"),
    ("data:\n  root: \0\n", "not valid YAML"),
    ("data:\n  root: !!python/object/apply:os.system [x]\n", "not valid YAML"),
    (f"trainer:\n  seed: {'9' * 5000}\n", "x.yaml"),
    (f"data:\n  root: [{', '.join('x' * 1000)}]\n", "data.root must be str"),
])
def test_absurd_files_cost_a_sentence(tmp_path, text, told):
    assert told in sentence(written(tmp_path, text))


@pytest.mark.parametrize("override, told", [
    ("data.num_workers=100000", "data.num_workers is 100000; it must be at most 256"),
    ("optimizer.lr=.inf", "optimizer.lr is inf; it must be at most 1"),
    ("optimizer.lr=.nan", "optimizer.lr is nan; it must be positive"),
    ("optimizer.lr=1e400", "optimizer.lr is inf"),
    (f"optimizer.lr={'9' * 400}", "optimizer.lr must be float"),
    ("optimizer.eps=.inf", "optimizer.eps is inf"),
    ("optimizer.ema_rate=0.5", "optimizer.ema_rate is 0.5; it must be at most 0.28"),
    ("optimizer.betas=[.nan, 0.9]", "optimizer.betas is [nan, 0.9]"),
    ("optimizer.betas=[0.9, 1]", "optimizer.betas is [0.9, 1.0]; give two from 0 to below 1"),
    ("parallel.timeout_s=.inf", "parallel.timeout_s is inf"),
    ("trainer.guidance=.inf", "trainer.guidance is inf"),
    ("model.num_blocks=100000", "model.num_blocks is 100000; it must be at most 100"),
    ("model.model_channels=1000000000", "it must be at most 65536"),
    ("data.max_bad=2", "data.max_bad is 2.0; it must be at most 1"),
    (f"trainer.seed={'9' * 500}", "trainer.seed is 999"),
    ("trainer.seed=-1", "trainer.seed is -1"),
    ("trainer.max_iter=010", "trainer.max_iter must be int, not '010'"),
    ("trainer.max_iter=1.5e0", "trainer.max_iter must be int, not 1.5"),
    ("data.num_workers=true", "data.num_workers must be int, not True"),
    ("job.stage=[pretrain]", "job.stage must be pretrain or posttrain"),
    (f"{'x' * 100_000}.y=1", "there is no config key xxx"),
    ("data.root=*a", "refers to an anchor"),
])
def test_absurd_values_cost_a_sentence(override, told):
    assert told in sentence(CONFIGS / "smoke.yaml", [override])


def test_what_is_trained_must_be_a_part_of_the_model():
    names = [name for name, _ in full_model(dataclasses.astuple(load().model)).named_parameters()]
    schema.check_trained(["control"], names)
    parts = ["control.blocks.0", "base.blocks.27.mlp", "base.patch_embed.weight"]
    schema.check_trained(parts, names)
    mistakes = {"controls": "control", "contrl": "control", "control.block.0": "control.blocks.0",
                "control.blocks.3": "control.blocks.", "base.": "base", "net": "", "con": "",
                "base.blocks.1.mpl": "base.blocks.1.mlp"}
    for prefix, close in mistakes.items():
        with pytest.raises(ValueError, match=f"trainer.train names {prefix}, .* mean .*{close}"):
            schema.check_trained(["control", prefix], names)
    with pytest.raises(ValueError, match="trainer.train is empty"):
        schema.check_trained([], names)


@pytest.mark.parametrize("prefixes, trained", [
    (["control"], ("control.",)), (["control", "base"], ("control.", "base.")),
    (["base.blocks.1.mlp"], ("base.blocks.1.mlp.",)),
    (["control.blocks.0", "base.patch_embed.weight"],
     ("control.blocks.0.", "base.patch_embed.weight")),
])
def test_what_the_config_names_is_trained(prefixes, trained):
    model = m_build(train.load_config(*[SMOKE[0], SMOKE[1:]]).model, "meta", torch.float32)
    train.choose_trained(model, prefixes)
    for name, parameter in model.named_parameters():
        wanted = name.startswith(trained) and not name.startswith("control.head.")
        assert parameter.requires_grad == wanted, name


def test_a_run_trains_what_the_config_names(outputs, capsys):
    words = [*SMOKE, "trainer.train=[base.blocks.1.mlp]", "checkpoint.save_iter=1"]
    assert train.main(words) == 0
    file = next(outputs.rglob("iter_000000001_optim_mp_0.pt"))
    masters = torch.load(file, weights_only=True)["master"]
    assert masters and all("blocks.block1.blocks.2." in name for name in masters), masters.keys()
    for told, value in ("did you mean base?", "[bas]"), ("which nothing is", "[control.head]"):
        assert told in refusal([*SMOKE, f"trainer.train={value}", "job.name=other"], capsys)
    message = refusal([*SMOKE, "trainer.train=[control]", "trainer.max_iter=2"], capsys)
    assert "trainer.train" in message


@pytest.mark.parametrize("name, main", [("train", train.main), ("data", check.main)])
@pytest.mark.parametrize("words", [["-h"], ["--help"], ["configs/smoke.yaml", "--help"]])
def test_help_says_how_and_where_the_keys_are(name, main, words, capsys):
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert f"python {name}.py" in printed and "configs/lidar.yaml" in printed


def test_a_written_config_is_a_config(tmp_path):
    cfg = load("mv_v2w_lidar_posttrain", "data.num_workers=0")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(cfg), sort_keys=False))
    assert train.load_config(tmp_path / "config.yaml") == cfg


# ---- dry run -------------------------------------------------------------------------------------


def table(text):
    """The rows that the dry run prints below the config."""
    rows = [re.fullmatch(r"(.{36}\S*) +(.*)", row) for row in text.split("\n\n", 1)[1].splitlines()]
    return {row[1].strip(): row[2].strip() for row in rows}


@every_config
def test_dryrun(name, overrides, expected, outputs, monkeypatch, capsys):
    monkeypatch.setattr(m, "build", lambda cfg, device, dtype: full_model(dataclasses.astuple(cfg)))
    assert train.main([str(CONFIGS / f"{name}.yaml"), "--dryrun", *overrides]) == 0
    printed = capsys.readouterr().out
    cfg, rows = load(name, *overrides), table(printed)
    assert yaml.safe_load(printed.split("\n\n", 1)[0]) == dataclasses.asdict(cfg)
    assert yaml.safe_load((cfg.run_dir / "config.yaml").read_text()) == dataclasses.asdict(cfg)
    assert cfg.run_dir.is_relative_to(outputs) and rows["run"] == str(cfg.run_dir)
    assert rows["parameters: base"] == f"{expected.base_parameters:,}"
    assert rows["parameters: control"] == f"{expected.control_parameters:,}"
    assert rows["tokens a sample"] == f"{expected.tokens:,}"
    assert rows["latents"] == " x ".join(map(str, expected.latent))
    assert rows["sigma multiplier"] == f"{expected.sigma:.3f}"
    assert rows["mesh"] == "8 ranks = dp 1 x tp 8"
    assert rows["path: checkpoint.base_path"].split() == [expected.base, "MISSING"]
    assert ("path: checkpoint.load_path" in rows) == name.endswith("_posttrain")
    total = float(rows.pop("GiB a GPU: total").split()[0])
    parts = [float(value) for key, value in rows.items() if key.startswith("GiB a GPU: ")]
    assert len(parts) == 8 and abs(sum(parts) - total) < 0.05


@pytest.mark.parametrize("card, peak", [
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835),
    ("NVIDIA H200", 989), ("NVIDIA H200 NVL", 835), ("NVIDIA A100-SXM4-80GB", 312),
    ("NVIDIA B200", 2250), ("NVIDIA GB200", 2500), ("NVIDIA GH200 480GB", 989),
    ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA H800 PCIe", 756), ("NVIDIA RTX A1000", None),
    ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None), ("NVIDIA GeForce RTX 3090", None)])
def test_mfu_is_a_part_of_what_the_card_can_do(card, peak):
    assert estimate.peak_tflops(card) == peak


def test_the_smoke_run_leaves_gpus_alone(outputs, monkeypatch):
    for device, visible in (("auto", "0,1"), ("cpu", "")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
        words = [] if device == "cpu" else [f"trainer.device={device}"]
        assert train.main([str(CONFIGS / "smoke.yaml"), "--dryrun", *words]) == 0
        assert os.environ["CUDA_VISIBLE_DEVICES"] == visible


def test_a_model_of_full_size_is_not_trained_on_a_cpu_unasked():
    """As where the driver is older than torch needs: torch then sees no GPU."""
    with pytest.raises(ValueError, match=r"torch \S+ sees no GPU \(.+\), and a model"):
        train.need_files(load("bench"))
    for cfg in (load("bench", "trainer.device=cpu"), load("smoke", "trainer.device=auto")):
        train.need_files(cfg)


def test_dryrun_finds_the_paths_that_are_there(outputs, capsys):
    for path in ("clips", "tokenizer", "base.pt"):
        Path(path).touch()
    words = ["data.root=clips", "tokenizer.path=tokenizer", "checkpoint.base_path=base.pt"]
    assert train.main([*SMOKE, "--dryrun", *words]) == 0
    rows = table(capsys.readouterr().out)
    found = [value for key, value in rows.items() if key.startswith("path: ")]
    assert sorted(found) == ["base.pt", "clips", "tokenizer"]
    Path("folder").mkdir()
    Path("folder/encoder.jit").touch()
    assert train.main([*SMOKE, "--dryrun", "data.root=clips", "tokenizer.path=folder"]) == 0
    row = table(capsys.readouterr().out)["path: tokenizer.path"]
    assert row.split(maxsplit=1) == ["folder", "MISSING: decoder.jit, mean_std.pt"]


def test_sharded_and_replicated_parameters_shrink_as_they_should(monkeypatch):
    """The estimate of weights at tp 8: an eighth of the sharded and all of the replicated ones."""
    cfg = load()
    shapes = full_model(dataclasses.astuple(cfg.model))
    held = 0
    for name, p in shapes.named_parameters():
        if not name.startswith("logvar"):
            sharded = convert.tp_dim_of(convert.to_nvidia(name)) is not None
            held += p.numel() // 8 if sharded else p.numel()
    plan = estimate.Plan("megatron", ["attention_saved"] * 30)
    parts = estimate.estimate(cfg, shapes, plan)
    assert (parts["base weights"] + parts["control weights"]) * 2**30 == pytest.approx(2 * held)


@pytest.mark.parametrize("ranks, model, optim", [
    (2, 3_146_878_537, 6_280_079_987), (4, 2_052_165_193, 4_090_652_259)])
def test_a_checkpoint_takes_what_its_files_took(ranks, model, optim):
    """Sizes of rank 0's files of lidar.yaml's run, listed after a save at full size."""
    cfg = load("lidar", f"parallel.tp={ranks}")
    shapes = full_model(dataclasses.astuple(cfg.model))
    estimated = estimate.checkpoint_bytes(cfg, shapes)
    replicated = sum(p.numel() for name, p in shapes.control.named_parameters()
                     if not hasattr(p, "tp_dim") and not name.startswith("head."))
    others = optim - 12 * replicated  # rank 0's alone has these masters and moments
    assert estimated == pytest.approx(ranks * model + optim + (ranks - 1) * others, rel=1e-4)


@pytest.mark.parametrize("name, words, more, less", [
    ("mv_t2w_lidar", ["parallel.tp=1"], "attention_saved", "full"),
    ("lidar", ["parallel.tp=1"], "residual_saved", "attention_saved"),
    ("lidar", ["parallel.tp=2", "parallel.scheme=megatron"], "none", "mlp_saved"),
    ("lidar", ["parallel.tp=2", "parallel.whole_blocks=2"], "mlp_saved", "residual_saved"),
    ("lidar", ["parallel.tp=2", "parallel.recompute=full"], "none", "full"),
])
def test_blocks_keep_as_much_as_fits(monkeypatch, name, words, more, less):
    """What is dearest to repeat for its size first, on a card of 79 GiB."""
    monkeypatch.setattr(estimate, "gpu_memory", lambda: None)
    cfg = load(name, "parallel.host_gib=0", *words)
    shapes = full_model(dataclasses.astuple(cfg.model))
    size = lambda keep: sum(estimate.estimate(cfg, shapes, plan._replace(keep=keep)).values())
    plan = estimate.choose_plan(cfg, shapes)
    first = cfg.parallel.whole_blocks or 1
    n = plan.keep[:27].count(more) - first * (more == "none")  # the others are trained
    most = "residual_saved" if plan.scheme == "ulysses" else "attention_saved"
    trained = [min(less, most, key=estimate.LADDER.index)] * 3
    assert plan.keep == ["none"] * first + [more] * n + [less] * (27 - first - n) + trained
    one_more = ["none"] * first + [more] * (n + 1) + [less] * (26 - first - n) + trained
    assert n > 0
    assert size(plan.keep) < 0.95 * 79 <= size(one_more)
    if first == 1:  # whole at no cost
        assert size(plan.keep) == pytest.approx(size([less] + plan.keep[1:]))
    said = f"keeps {plan.keep.count('none')} of 30 blocks whole"
    assert estimate.describe(plan, 1).startswith(said)
    slower = plan._replace(keep=["none"] * first + [less] * (27 - first) + trained)
    slower = estimate.seconds(cfg, shapes, slower, "cudnn")
    assert sum(estimate.seconds(cfg, shapes, plan, "cudnn").values()) < sum(slower.values())


@pytest.mark.parametrize("name, words, gib", [
    ("mv_t2w_lidar", ["parallel.tp=1"], 20), ("lidar", ["parallel.tp=1"], 60),
    ("mv_v2w_hdmap", ["parallel.tp=2", "parallel.scheme=ulysses"], 40),
    ("lidar", ["parallel.tp=2", "parallel.scheme=megatron"], 20),
    ("lidar", ["parallel.tp=1", "parallel.recompute=attention_saved"], 30),
])
def test_host_memory_is_taken_where_it_makes_steps_faster(monkeypatch, name, words, gib):
    """As much as is given, and the GPU has to hold no more for it."""
    monkeypatch.setattr(estimate, "gpu_memory", lambda: None)
    cfg = load(name, *words)
    shapes = full_model(dataclasses.astuple(cfg.model))
    plans = {}
    for cfg.parallel.host_gib in (0, gib):
        plans[cfg.parallel.host_gib] = estimate.choose_plan(cfg, shapes)
    without, plan = plans[0], plans[gib]
    assert without.host == 0 < plan.host and len(plan.keep) == 30
    assert plan.keep[-plan.host:] == [plan.keep[-1]] * plan.host and "none" not in plan.keep[-3:]
    trained = estimate.trained_blocks(shapes)
    assert 0.5 * gib < estimate.host_bytes(cfg, plan, trained) / 2**30 <= gib
    assert sum(estimate.estimate(cfg, shapes, plan).values()) < 0.95 * 79
    seconds = lambda plan: sum(estimate.seconds(cfg, shapes, plan, "cudnn").values())
    assert seconds(plan) < seconds(without)
    assert f", {plan.host} of the 30 in host memory" in estimate.describe(plan, 1)


def test_a_run_leaves_other_gpus_their_share_of_host_memory(monkeypatch):
    """By default half of what is free, and a checkpoint has to fit beside it."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(recompute, "free_memory", lambda: 120.0)
    monkeypatch.setattr(Path, "exists", lambda path: False)
    monkeypatch.setattr(recompute.torch.cuda, "device_count", lambda: 8)
    assert recompute.host_room(None, 15) == 120 / 2 / 8
    assert recompute.host_room(None, 82) == pytest.approx((0.95 * 120 - 82) / 8)
    assert recompute.host_room(None, 150) == recompute.host_room(0, 150) == 0
    assert recompute.host_room(24, 15) == 24  # asked for: of these ranks alone
    told = "host_gib 25 for 4 ranks is more than the 99.0 GiB .* 15.0 and a .*; give 24 or less"
    with pytest.raises(ValueError, match=told):
        recompute.host_room(25, 15)
    monkeypatch.setattr(recompute.torch.cuda, "device_count", lambda: 1)  # hidden from this rank
    assert recompute.host_room(None, 15) == 120 / 2 / 4
    monkeypatch.setattr(Path, "exists", lambda path: True)
    monkeypatch.setattr(Path, "iterdir", lambda path: iter(range(16)))  # but there
    assert recompute.host_room(None, 15) == 120 / 2 / 16
    monkeypatch.setattr(recompute, "free_memory", lambda: None)  # not known: only if asked for
    assert recompute.host_room(None, 15) == 0 and recompute.host_room(13, 15) == 13


@pytest.fixture
def large(monkeypatch):
    """Rooms and speeds of two ranks for a large model, which agree_on_plan finds."""
    found = {"rooms": (64.0, 62.8), "speeds": (55.0, 50.0), "pins": ("", "")}
    shapes = full_model(dataclasses.astuple(load("lidar").model))

    def from_all(value):  # of this rank, the second
        if isinstance(value, tuple):
            return [(found["rooms"][0], found["speeds"][0], ""), value]
        return [found["pins"][0], value] if isinstance(value, str) else [value, value]

    def speed():
        if found["speeds"][1] is None:
            raise ValueError("CUDA pins no 0.25 GiB more of host memory")
        return found["speeds"][1]

    def reserve(size, for_gpu=True):
        found["reserved"] = size / 2**30
        return found["pins"][1]

    monkeypatch.setattr(tp, "from_all", from_all)
    monkeypatch.setattr(estimate, "gpu_memory", lambda: 79.2)
    monkeypatch.setattr(estimate, "bus_speed", speed)
    monkeypatch.setattr(estimate, "host_room", lambda asked, saved: found["rooms"][1])
    monkeypatch.setattr(estimate.host, "reserve", reserve)
    monkeypatch.setattr(estimate.host, "room", 0.0)
    monkeypatch.setattr(estimate.host, "bus", 0.0)
    return found, lambda *words: estimate.agree_on_plan(load("lidar", "parallel.tp=1", *words),
                                                        shapes)


@pytest.mark.parametrize("scarce", [
    {"rooms": (64.0, 0.0)}, {"rooms": (0.0, 64.0)}, {"speeds": (1.0, 55.0)}, {"speeds": (55.0, 1.0)}
])
def test_all_ranks_do_with_what_the_poorest_has(large, scarce):
    found, agree = large
    rich = agree()
    assert (estimate.host.room, estimate.host.bus) == (62.8, 50)  # which the first lines say
    assert rich.host == 16 and found["reserved"] == pytest.approx(62.7, abs=0.1)
    found |= scarce
    assert agree().host == 0 and found["reserved"] == 0


@pytest.mark.parametrize("failing", [{"speeds": (55.0, None)}, {"pins": ("CUDA pins no", "")},
                                     {"pins": ("", "the system gives no")}])
def test_a_machine_that_pins_nothing_does_without_host_memory(monkeypatch, large, failing):
    """Unless it was asked for; one rank says so."""
    found, agree = large
    found |= failing
    with pytest.warns(UserWarning, match="keep nothing in host memory: (CUDA|the system)"):
        assert agree().host == 0
    assert found["reserved"] == estimate.host.room == 0
    with pytest.raises(ValueError, match="^(CUDA pins|the system gives) no"):
        agree("parallel.host_gib=60")
    monkeypatch.setattr(tp, "world_rank", lambda: 1)
    with warnings.catch_warnings(action="error"):
        assert agree().host == 0


def test_memory_that_is_not_there_is_not_pinned(monkeypatch):
    monkeypatch.setattr(recompute, "free_memory", lambda: 2.0)
    with pytest.raises(ValueError, match=r"2.0 GiB of host memory are wanted, of which 2.0 are"):
        recompute.pinned(2**31)
    def refuse(*_):
        raise OSError(12, "Cannot allocate memory")
    monkeypatch.setattr(recompute.mmap, "mmap", refuse)
    told = recompute.Host().reserve(2**30)
    assert told.startswith("the system gives no 1.0 GiB more of host memory (Cannot allocate")


@pytest.mark.parametrize("name, words, room, bus", [
    ("lidar", ["parallel.tp=1"], 64, 1), ("lidar", ["parallel.tp=2"], 2.5, 50),  # brings 0.4%
    ("mv_t2w_lidar", ["parallel.tp=1"], 20, 1),  # where attention is repeated without
    ("lidar", ["parallel.tp=1", "data.num_frames=57"], 64, 3),
])
def test_host_memory_that_brings_too_little_is_not_taken(monkeypatch, name, words, room, bus):
    monkeypatch.setattr(estimate, "gpu_memory", lambda: None)
    cfg = load(name, *words)
    shapes = full_model(dataclasses.astuple(cfg.model))
    plan = estimate.choose_plan(cfg, shapes, room, bus)
    assert plan == estimate.choose_plan(cfg, shapes, 0)
    if bus < 50:
        assert estimate.choose_plan(cfg, shapes, room, 50).host > 0


def test_a_scheme_does_not_depend_on_host_memory(monkeypatch):
    monkeypatch.setattr(estimate, "gpu_memory", lambda: 40)  # where ulysses does not fit without
    cfg = load("lidar", "parallel.tp=2")
    shapes = full_model(dataclasses.astuple(cfg.model))
    plans = [estimate.choose_plan(cfg, shapes, room) for room in (0, 64)]
    assert [plan.scheme for plan in plans] == ["megatron"] * 2 and plans[1].host > 0


def test_what_fits_with_more_host_memory_says_so(monkeypatch):
    monkeypatch.setattr(estimate, "gpu_memory", lambda: None)
    cfg = load("lidar", "parallel.tp=1", "data.batch_size=2")
    shapes = full_model(dataclasses.astuple(cfg.model))
    plan = estimate.choose_plan(cfg, shapes)  # without a GPU: of 79 GiB, and 64 of the machine's
    assert plan == estimate.choose_plan(cfg, shapes, 64) and plan.host > 0
    with pytest.raises(ValueError, match=", or more host memory than 3 GiB a rank$"):
        estimate.choose_plan(cfg, shapes, 3)
    cfg = load("lidar", "parallel.tp=1", "data.batch_size=9")  # no memory helps it
    with pytest.raises(ValueError, match="with a larger parallel.tp$"):
        estimate.choose_plan(cfg, shapes, 3)


def test_what_comes_back_for_the_next_block_is_counted():
    """While one block runs backward; what the others have in host memory is not."""
    cfg = load("bench", "parallel.tp=1")
    shapes = full_model(dataclasses.astuple(cfg.model))
    plan = lambda *last: estimate.Plan("megatron", ["none", *["full"] * 27, *last], 29)
    activations = lambda *last: estimate.estimate(cfg, shapes, plan(*last))["activations"]
    inputs, early, late = (activations("full", "full"), activations("mlp_saved", "full"),
                           activations("full", "mlp_saved"))
    stream = estimate.stream_bytes(cfg, plan("full", "full")) / 2**30
    assert 10 * stream < early - inputs < late - inputs < 13 * stream  # of a trained block
    assert activations("mlp_saved", "mlp_saved") == late


@pytest.mark.parametrize("words, room, host, peak", [  # on an H100 of 79.2 GiB
    (["parallel.tp=1"], 0, 0, 75.22), (["parallel.tp=1"], 62.8, 62.7, 73.51),
    (["parallel.tp=1"], 125, 93.7, 73.66),
    (["parallel.tp=1", "data.num_frames=57", "data.views=3", "model.conditioning=t2w"], 62.8, 52.2,
     73.92),
    (["parallel.tp=2", "parallel.scheme=ulysses"], 125, 44.7, 74.11),
    (["parallel.tp=2", "parallel.scheme=megatron"], 125, 30.3, 74.46),
])
def test_the_estimate_is_the_measured_peak(monkeypatch, words, room, host, peak):
    monkeypatch.setattr(estimate, "gpu_memory", lambda: 79.2)
    cfg = load("bench", *words)
    shapes = full_model(dataclasses.astuple(cfg.model))
    plan = estimate.choose_plan(cfg, shapes, room)
    away = estimate.host_bytes(cfg, plan, estimate.trained_blocks(shapes)) / 2**30
    assert away == pytest.approx(host, abs=0.06)
    assert sum(estimate.estimate(cfg, shapes, plan).values()) == pytest.approx(peak, rel=0.005)


def measured():
    """README's table of speeds: words, kernel, seconds (predicted), peak GiB (estimate), host."""
    cells = (r"(.*?) ?", r"(\d) ", r"(\w*) ?", r"(\S+) ", r"(\S+) \((\S+)\) ", r"\S+ ",
             r"(\S+) \((\S+)\) ", r"(\S+) ")
    row = re.compile("^" + "".join(rf"\| {cell}" for cell in cells) + r"\|$", re.M)
    rows, words = [], []
    for clip, ranks, scheme, *found in row.findall((ROOT / "README.md").read_text()):
        words = re.findall(r"[\w.]+=\w+", clip) if clip else words  # an empty cell: as above
        how = [f"parallel.tp={ranks}", f"parallel.scheme={scheme or 'auto'}"]
        rows.append(([*words, *how], *found))
    return rows


@pytest.mark.parametrize("words, kernel, seconds, predicted, peak, estimated, host", measured())
def test_the_estimate_is_what_was_measured(words, kernel, seconds, predicted, peak, estimated,
                                           host):
    cfg = load("bench", *words, f"parallel.host_gib={float(host) + 0.1}")
    shapes = full_model(dataclasses.astuple(cfg.model))
    plan = estimate.choose_plan(cfg, shapes)
    away = estimate.host_bytes(cfg, plan, estimate.trained_blocks(shapes)) / 2**30
    assert away == pytest.approx(float(host), abs=0.05)
    step = sum(estimate.seconds(cfg, shapes, plan, kernel.lower()).values())
    needed = sum(estimate.estimate(cfg, shapes, plan).values())
    assert (f"{step:.2f}", f"{needed:.1f}") == (predicted, estimated)
    assert step == pytest.approx(float(seconds), rel=0.035)
    assert needed == pytest.approx(float(peak), rel=0.014)


def test_all_that_was_measured_is_compared_with_the_estimate():
    assert len(measured()) >= 12


def test_free_memory_is_what_the_machine_and_all_cgroups_leave(monkeypatch):
    """Of either version, wherever the process is; what files take there is let go."""
    files = {"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 8388608 kB\n"}
    real = Path.read_text
    def read_text(path, *rest):
        if not str(path).startswith(("/proc", "/sys")):
            return real(path, *rest)
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]
    monkeypatch.setattr(Path, "read_text", read_text)
    assert recompute.free_memory() == 8
    files["/proc/self/cgroup"] = "8:cpu,memory:/job\n7:cpu:/\n0::/slurm/job/step\n"
    two = "/sys/fs/cgroup/slurm/job"
    files |= {f"{two}/memory.max": "max\n", f"{two}/memory.current": f"{3 * 2**30}\n"}
    assert recompute.free_memory() == 8
    files |= {f"{two}/memory.max": f"{6 * 2**30}\n",
              f"{two}/memory.stat": f"anon 1\ninactive_file {2**30}\nactive_file {2**30}\n"}
    assert recompute.free_memory() == 5
    one = "/sys/fs/cgroup/memory/job"
    files |= {f"{one}/memory.limit_in_bytes": f"{5 * 2**30}\n",
              f"{one}/memory.usage_in_bytes": f"{3 * 2**30}\n",
              f"{one}/memory.stat": f"inactive_file 7\ntotal_inactive_file {2**30}\n"}
    assert recompute.free_memory() == 3
    files["/sys/fs/cgroup/memory.max"] = f"{2**30}\n"  # the topmost that a container sees
    files["/sys/fs/cgroup/memory.current"] = "0\n"
    assert recompute.free_memory() == 1
    files.clear()
    assert recompute.free_memory() is None


# ---- reruns --------------------------------------------------------------------------------------

SMOKE = [str(CONFIGS / "smoke.yaml"), "data.root=random", "model.model_channels=64",
         "model.text_tokens=8", "model.crossattn_emb_channels=32", "data.num_frames=17",
         "data.height=48", "data.width=80", "trainer.sample_iter=0", "trainer.max_iter=1",
         "checkpoint.save_iter=0", "model.num_blocks=3", "model.num_control_blocks=2",
         "data.batch_size=2", "optimizer.lr=1e-3", "checkpoint.base_path=random"]


def test_a_rerun_with_another_config_is_refused(outputs, capsys):
    config = outputs / "smoke" / "smoke" / "smoke" / "config.yaml"
    assert train.main([*SMOKE, "optimizer.lr=0.25", "--dryrun"]) == 0  # binds nothing
    assert train.main([*SMOKE, "checkpoint.save_iter=1"]) == 0
    before = config.read_text()
    changed = [*SMOKE, "optimizer.lr=0.5", "data.num_frames=9"]
    for words in (changed, [*changed, "--dryrun"]):
        message = refusal(words, capsys)
        assert "optimizer.lr: 0.001 -> 0.5" in message and "data.num_frames: 17 -> 9" in message
        assert "job.name" in message and "--allow-config-change" in message
        assert config.read_text() == before
    assert train.main([*changed, "--dryrun", "--allow-config-change"]) == 0
    assert config.read_text() == before  # a dry run changes nothing of a run that has begun
    assert train.main([*changed, "--allow-config-change"]) == 0
    assert yaml.safe_load(config.read_text())["data"]["num_frames"] == 9
    assert train.main([*changed, "--dryrun"]) == 0  # it is now the run's config


def test_a_rerun_may_change_what_does_not_change_the_training(outputs):
    assert train.main([*SMOKE, "checkpoint.save_iter=1"]) == 0
    harmless = ["trainer.max_iter=7", "trainer.logging_iter=3", "checkpoint.save_iter=5",
                "parallel.tp=2", "data.num_workers=0"]
    assert train.main([*SMOKE, "--dryrun", *harmless]) == 0


def test_every_start_is_noted(outputs):
    for words in (SMOKE, [*SMOKE, "--dryrun"], [*SMOKE, "trainer.max_iter=2"]):
        assert train.main(words) == 0
    starts = (outputs / "smoke" / "smoke" / "smoke" / "starts.jsonl").read_text().splitlines()
    starts = [yaml.safe_load(line) for line in starts]
    words = [start["command"][-1] for start in starts]
    assert words == [SMOKE[-1], "trainer.max_iter=2"]  # not of the dry run
    assert starts[0]["torch"] == torch.__version__
    assert {"commit", "python", "numpy"} <= starts[0].keys()


# ---- mistakes: one sentence with the remedy, exit status 2, before memory is allocated -----------


def refusal(words, capsys):
    """The sentence on stderr with which train.py refuses these arguments."""
    capsys.readouterr()
    assert train.main([str(word) for word in words]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1, message
    return message


@pytest.fixture
def no_model(monkeypatch):
    def build(cfg, device, dtype):
        assert str(device) == "meta", "memory was allocated before the mistake was noticed"
        return m_build(cfg, device, dtype)

    monkeypatch.setattr(m, "build", build)


@pytest.mark.parametrize("words, told", [
    (["trainer.max_itr=5"], ["no config key trainer.max_itr", "did you mean trainer.max_iter?"]),
    (["trainer.max_iter=many"], ["trainer.max_iter must be int, not 'many'"]),
    (["checkpoint.base_path=base.pt"],
     ["not there: checkpoint.base_path base.pt", "where to get them"]),
    (["data.cache=latents"], ["not there: data.cache latents", "how data.py cache makes a"]),
    (["data.hint=sonar"], ["data.hint", "'sonar'", "lidar or hdmap"]),
    (["parallel.tp=3"], ["num_heads 4 is not divisible by tp 3; use 1, 2 or 4"]),
    (["data.num_frames=120"], ["data.num_frames is 120; the tokenizer needs 8k+1, such as 121"]),
    (["model.conditioning=t2w"], ["data.views is 1", "model.conditioning", "t2w", "data.views=3"]),
    (["data.views=3"], ["data.views is 3", "model.conditioning", "t2w", "v2w", "data.views=1"]),
    (["job.stage=posttrain"], ["posttrain", "checkpoint.load_path", "control checkpoint"]),
    (["checkpoint.load_path=x.pt"], ["checkpoint.load_path", "x.pt", "job.stage"]),
    (["job.stage=finetune"], ["job.stage", "'finetune'", "pretrain or posttrain"]),
    (["checkpoint.keep_last=0"], ["checkpoint.keep_last is 0; it must be positive"]),
    (["optimizer.warmup_steps=-1"], ["optimizer.warmup_steps is -1; it must be positive or 0"]),
    (["data.views=3", "model.conditioning=v2v"], ["model.conditioning is v2v", "t2w or v2w"]),
    (["model.num_heads=64"], ["model.num_heads (64) must divide half of model_channels (64)"]),
    (["model.num_control_blocks=9"],
     ["num_control_blocks is 9; it must not exceed num_blocks (3)"]),
    (["data.views=3", "model.conditioning=t2w", "model.n_views_emb=5"],
     ["model.n_views_emb is 5", "at least 6"]),
    (["data.width=400"], ["3 x 6 x 50 latent cells",
                          "8 x 32 x 32", "model.max_frames, max_img_h and max_img_w"]),
    (["data.height=100"], ["100 x 80; both must be multiples of 16"]),
    (["data.root=nowhere"], ["not there: data.root nowhere"]),
    (["--dry-run"], ["--dry-run", "--dryrun", "--allow-config-change"]),
])
def test_mistakes_cost_one_sentence(words, told, outputs, capsys, no_model):
    message = refusal([*SMOKE, *words], capsys)
    for part in told:
        assert part in message, message


def test_mistakes_in_what_is_to_be_estimated(capsys):
    for words, told in ((["x.yaml"], "error: there is no config file x.yaml"),
                        ([str(SMOKE[0]), "trainer.sed=1"], "did you mean trainer.seed?")):
        with pytest.raises(SystemExit, match=re.escape(told)):
            estimate.main(words)


def test_only_meshes_that_can_run_are_estimated_and_the_tokenizer_where_one_is(capsys):
    estimate.main([str(SMOKE[0])])
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()[3:]} == {"1", "2", "4"}
    samples = "trainer.sample_iter=9"
    for words, there in ((["data.cache=null"], True), (["data.cache=auto"], True),
                         (["data.cache=x"], False), (["data.cache=x", samples], True),
                         (["data.root=random", samples], False)):
        cfg = schema.load_config(SMOKE[0], ["trainer.sample_iter=0", *words])
        shapes = train.build(cfg, "meta")
        parts = estimate.estimate(cfg, shapes, estimate.choose_plan(cfg, shapes))
        assert (parts["tokenizer"] > 0) == there, words


def test_a_parameter_that_no_checkpoint_could_hold_is_told_at_the_start():
    cfg = schema.load_config(SMOKE[0])
    net = m.build(cfg.model, "meta", torch.float32)
    net.control.extra = torch.nn.Linear(2, 2, device="meta")
    with pytest.raises(ValueError, match="control.extra.weight .* needs a line in convert.py"):
        train.choose_trained(net, ["control"])


def test_full_size_tensor_parallel_mistakes(outputs, capsys, no_model, monkeypatch):
    lidar = [CONFIGS / "lidar.yaml", "--dryrun"]
    message = refusal([*lidar, "parallel.tp=3"], capsys)
    assert "num_heads 32 is not divisible by tp 3; use 1, 2, 4, 8, 16 or 32" in message
    monkeypatch.setenv("WORLD_SIZE", "4")
    message = refusal(lidar, capsys)
    assert "a world of 4 ranks is not divisible by parallel.tp 8; use 1, 2 or 4" in message


def test_an_unwritable_output(outputs, capsys, no_model):
    outputs.write_text("a file where the folder should be")
    for words in (SMOKE, [*SMOKE, "--dryrun"]):
        message = refusal(words, capsys)
        assert f"cannot write the run's folder {outputs}" in message
        assert "set OUTPUT_ROOT" in message


def write_checkpoint(path, part, *overrides):
    """A released-like file of the small model: its base with logvar, or its control branch."""
    cfg = train.load_config(SMOKE[0], [*SMOKE[1:], *overrides])
    model = m_build(cfg.model, "cpu", torch.float32)
    tp.init_weights(model, 0)
    tensors = {convert.to_nvidia(name).removeprefix("base_model."): tensor.detach()
               for name, tensor in [*model.named_parameters(), *model.named_buffers()]
               if name.startswith((part, "logvar."))}
    torch.save(tensors | {"net.pos_embedder.seq": torch.arange(16.0)}, path)
    return str(path)


MULTI_VIEW = ("data.views=3", "model.conditioning=t2w")


def test_files_of_another_model(outputs, capsys, no_model):
    single, multi = (write_checkpoint(f"{name}.pt", "base.", *words) for name, words in
                     (("single", ()), ("multi", MULTI_VIEW)))
    control = write_checkpoint("control.pt", "control.")
    message = refusal([*SMOKE, *MULTI_VIEW, f"checkpoint.base_path={single}"], capsys)
    assert "single.pt" in message and "single-view base" in message and "missing" in message
    message = refusal([*SMOKE, f"checkpoint.base_path={multi}", "--allow-config-change"], capsys)
    assert "multi.pt" in message and "multi-view base" in message
    assert "does not fit the base" in message
    message = refusal([*SMOKE, f"checkpoint.base_path={control}", "--allow-config-change"], capsys)
    assert "control.pt" in message and "single-view control" in message
    posttrain = ["job.stage=posttrain", f"checkpoint.load_path={single}"]
    message = refusal([*SMOKE, *posttrain, "--allow-config-change"], capsys)
    assert "single.pt" in message and "does not fit the control" in message


def test_the_right_files_train(outputs, capsys):
    base, control = write_checkpoint("b.pt", "base."), write_checkpoint("c.pt", "control.")
    words = [f"checkpoint.base_path={base}", f"checkpoint.load_path={control}",
             "job.stage=posttrain"]
    assert train.main([*SMOKE, *words]) == 0
    printed = capsys.readouterr().out
    assert "loaded base from b.pt" in printed and "loaded control from c.pt" in printed


def test_the_command_line_exits_with_2(outputs):
    command = [sys.executable, str(ROOT / "train.py"), str(CONFIGS / "lidar.yaml")]
    environment = {**os.environ, "OUTPUT_ROOT": str(outputs)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and done.stdout == "" and not outputs.exists()
    assert done.stderr.startswith("error: not there: ")
    assert "datasets/waymo_transfer1" in done.stderr
    assert done.stderr.count("\n") == 1
