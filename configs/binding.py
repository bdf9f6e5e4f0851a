"""What a run is bound to once it has a checkpoint: its config, its files and its clips."""

import hashlib
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

import tp
from configs.files import tokenizer_files
from configs.guard import writable
from configs.log import say
from configs.reading import REPOSITORY, need, read_yaml
from configs.schema import Config, dump
from convert import METADATA, check_same_base

# What may change when a run goes on: neither the model nor the sequence of updates depends on it.
# Paths may, as what they hold is compared, and batch_size with grad_accum, as their product with
# the replicas is. No schedule depends on max_iter; in a fork where one does, take it out. Another
# kind of device draws other noise from the same seeds.
HARMLESS = (
    "job.project", "job.group", "job.name",
    "parallel.", "checkpoint.", "tokenizer.path", "data.num_workers", "data.timeout_s",
    "data.max_bad", "data.batch_size", "trainer.grad_accum", "trainer.max_iter",
    "trainer.logging_iter", "trainer.sample_", "trainer.guidance", "trainer.val_iter",
    "trainer.check_every", "trainer.max_skipped", "trainer.tensorboard", "trainer.device",
)


def relevant(values: dict):
    """The values of a config on which depends what is trained."""
    kept = {key: value for key, value in values.items() if not key.startswith(HARMLESS)}
    kept["data.cache"] = bool(values.get("data.cache"))
    if values.get("data.root") not in ("random", "synthetic"):
        kept["data.root"] = "a folder"
    return kept


def open_run(cfg: Config, allow_change, argv, dry=False):
    """Make the run's folder, note config, command, commit and versions.

    ValueError if it holds a checkpoint of a run that trains something else. Without one, a config
    binds nothing. A dry run notes the config there, if nobody trains, and that is all.
    """
    path = cfg.run_dir / "config.yaml"
    bound = any((cfg.run_dir / "checkpoints").glob(METADATA))
    old = read_yaml(path) if bound and path.is_file() else {}
    need(old or allow_change or dry or not bound, f"{cfg.run_dir} holds checkpoints, but "
         f"{path.name} is missing or empty, so nothing says what they were trained with: copy it "
         "there, too, or start with --allow-config-change")
    if old:
        old, new = relevant(old), relevant(cfg.flat())
        changes = [f"{key}: {old.get(key)!r} -> {value!r}" for key, value in new.items()
                   if old.get(key) != value]
        need(allow_change or not changes, f"{cfg.run_dir} holds a run with another config "
             f"({'; '.join(changes)}); give this run its own job.name, or start it with "
             "--allow-config-change")
    with writable(cfg.run_dir):
        if not (dry and (bound or (cfg.run_dir / "lock.json").exists())):
            whole = path.with_suffix(".tmp")
            whole.write_text(dump(cfg))
            whole.replace(path)
        if not dry:
            (cfg.run_dir / "checkpoints").mkdir(exist_ok=True)
    if not dry:
        note_start(cfg, argv)


def note_start(cfg: Config, argv):
    """A line in starts.jsonl: what runs here. Not worth a training."""
    describe, commit = ["git", "-C", REPOSITORY, "describe", "--always", "--dirty"], ""
    try:
        commit = subprocess.run(describe, capture_output=True).stdout.decode().strip()
    except OSError:
        pass  # no git on this machine
    line = {"command": argv, "commit": commit, "python": sys.version.split()[0],
            "torch": torch.__version__, "numpy": np.__version__, "time": time.ctime()}
    try:
        with open(cfg.run_dir / "starts.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        say(f"warning: {error.filename} cannot be written: {error.strerror}; training goes on")


def identify(cfg: Config, clips, identities) -> dict:
    """What a run is trained from and on, in the order of training, as its checkpoints keep it."""
    digests = {}
    if cfg.data.root != "random":
        for file in tokenizer_files(cfg.tokenizer.path):
            with open(file, "rb") as opened:
                digests[file.name] = hashlib.file_digest(opened, "sha256").hexdigest()
        digests.pop("decoder.jit", None)  # what is trained does not depend on it
    return {**identities, "tokenizer": digests, "clips": list(getattr(clips, "clips", ())),
            "batch": [cfg.data.batch_size, cfg.trainer.grad_accum, tp.dp_size()]}


def differences(saved: dict, now: dict) -> list[str]:
    """In words, what a checkpoint's `identify` and this start's differ in."""
    found = []
    before, after = saved.get("clips", now["clips"]), now["clips"]
    for what, names in (("gone", set(before) - set(after)), ("added", set(after) - set(before))):
        if names:
            found.append(f"{len(names)} clips {what}: {', '.join(sorted(names)[:5])}")
    if saved.get("tokenizer", now["tokenizer"]) != now["tokenizer"]:
        found.append("the tokenizer's files are others")
    control = [identity.get("control", {}).get("sha256") for identity in (saved, now)]
    if control[0] != control[1]:
        found.append("the control checkpoint that it started from is another")
    old, new = saved.get("batch", now["batch"]), now["batch"]
    if old[:2] != new[:2] and math.prod(old) != math.prod(new):
        found.append(f"clips a step {math.prod(old)} -> {math.prod(new)} (data.batch_size x "
                     "trainer.grad_accum x replicas)")
    return found


def check_same_run(cfg: Config, saved: dict, now: dict, allow_change):
    """ValueError unless a checkpoint's `identify` and this start's train the same."""
    check_same_base(saved["base"], now["base"])
    found = differences(saved, now)
    need(allow_change or not found, f"{cfg.run_dir} holds a run that differs from this one: "
         f"{'; '.join(found)}; give this run its own job.name, or start it with "
         "--allow-config-change")
    old, new = (math.prod(i["batch"]) for i in (now | saved, now))
    if old != new:
        say(f"warning: the run goes on with {new} clips a step; it was {old}")
