"""Names and files: NVIDIA's names, split, merge, save, resume.

CPU only; nothing in a file is ever executed.

    python convert.py split FILE [--tp 8] [--format pt|safetensors]
    python convert.py merge ITER.pt [--output-directory D] [--include-base-model]
    python convert.py verify CONFIG [key.sub=value ...]
"""

import argparse
import contextlib
import itertools
import json
import math
import re
import sys
import threading
import time
import warnings
from collections import Counter, deque
from pathlib import Path

import configs  # first: it says so where Python is too old

import safetensors.torch
import torch

import tp
from configs.files import (DiskTensor, check_records, check_whole, file_mappings, fingerprints,
                           identify, is_metadata, named_tensors, read_file, verify, write)

# ---- names ---------------------------------------------------------------------------------------

SEQ = "net.pos_embedder.seq"  # a constant of the files, in no module of ours

# Each pair is our name and NVIDIA's; {} and * expand on both sides in step, and so
# {control,base}.blocks.*.mlp.{up,down}.weight stands for 2 x 100 x 2 names, among them
#     control.blocks.2.mlp.up.weight    net.blocks.block2.blocks.2.block.layer1.weight
#     base.blocks.27.mlp.down.weight    base_model.net.blocks.block27.blocks.2.block.layer2.weight
BLOCKS = ",".join(map(str, range(100)))  # for the * of the table: more than any model has
DIT = """
    patch_embed.weight          x_embedder.proj.1.weight
    time_mlp.{0,2}.weight       t_embedder.1.linear_{1,2}.weight
    emb_norm.weight             affline_norm.weight
    pos_{t,h,w}                 extra_pos_embedder.pos_emb_{t,h,w}
    pos_embedder.seq            pos_embedder.seq
    view_embed.weight           view_embeddings.weight
    frame_repeat.{weight,bias}  repeat_frame_embedding.{weight,bias}
    head.linear.weight          final_layer.linear.weight
    head.ada.{down,up}.weight   final_layer.adaLN_modulation.{1,2}.weight
    blocks.*.mlp.{up,down}.weight  blocks.block*.blocks.2.block.{layer1,layer2}.weight
    blocks.*.{self_attn,cross_attn,mlp}.ada.{down,up}.weight
        blocks.block*.blocks.{0,1,2}.adaLN_modulation.{1,2}.weight
    blocks.*.{self_attn,cross_attn}.{q,k,v,out}.weight
        blocks.block*.blocks.{0,1}.block.attn.to_{q,k,v,out}.0.weight
    blocks.*.{self_attn,cross_attn}.{q,k}_norm.weight
        blocks.block*.blocks.{0,1}.block.attn.to_{q,k}.1.weight"""
NAMES = re.sub(r"\n *(\S+)\s+(\S+)", r"\n{control,base}.\1  {net,base_model.net}.\2", DIT) + """
    control.hint_embed.weight  net.x_embedder2.proj.1.weight
    control.hint_encoder.{0,2,4,6,8,10,12,14}.{weight,bias}
        net.input_hint_block.{0,2,4,6,8,10,12,14}.{weight,bias}
    control.zero_linears.*.{weight,bias}  net.zero_blocks.block*.{weight,bias}
    logvar.{freqs,phases,weight}  logvar.{0.freqs,0.phases,1.weight}"""


def _expand(pattern):
    """The names that a side of the table stands for, a.{b,c} -> a.b, a.c; both sides in turn."""
    parts = [part.split(",") for part in re.split("[{}]", pattern.replace("*", f"{{{BLOCKS}}}"))]
    return map("".join, itertools.product(*parts))


_pairs = iter(NAMES.split())  # ours, theirs, ours, theirs, ...
OURS = {ours: theirs for pair in zip(_pairs, _pairs)
        for ours, theirs in zip(*map(_expand, pair), strict=True)}
THEIRS = {theirs: ours for ours, theirs in OURS.items()}


def to_nvidia(name: str, table: dict[str, str] = OURS) -> str:
    """Our full parameter name -> NVIDIA's. ValueError for a name that is none of ours."""
    if name not in table:
        raise ValueError(f"{name} is no parameter of the model or of a released checkpoint; a new "
                         "one needs a line in convert.py's DIT or NAMES")
    return table[name]


def from_nvidia(name: str) -> str:
    """NVIDIA's full name -> ours, or ValueError; `base_model.logvar.*` is the same `logvar`."""
    return to_nvidia(name.replace("base_model.logvar.", "logvar."), THEIRS)


def tp_dim_of(name: str) -> int | None:
    """Dimension along which the tensor of this NVIDIA name is split; None: replicated. For files,
    which come without modules: what tp.py's ColumnLinear and RowLinear declare."""
    if name.endswith(("to_q.0.weight", "to_k.0.weight", "to_v.0.weight", "layer1.weight")):
        return 0
    return 1 if name.endswith(("to_out.0.weight", "layer2.weight")) else None


# ---- reading -------------------------------------------------------------------------------------

def _files(path, kind="model"):
    """All ranks' files (of `kind`, model or optim) if `path` is a metadata file, or itself."""
    content = read_file(path)
    if not is_metadata(content):
        return [path]
    found = {file.stem: file for file in path.parent.iterdir()
             if file.suffix in (".pt", ".safetensors")}
    prefix, files = f"{path.stem}_{kind}_mp_", []
    count = content.get("tp_size") or sum(stem.startswith(prefix) for stem in found) or 1
    while len(files) < count:  # step by step: an altered count may be any number
        if (stem := f"{prefix}{len(files)}") not in found:
            raise FileNotFoundError(f"{path} needs {stem}.pt, which is not there")
        files.append(found[stem])
    return files


class Weights(dict):
    """{NVIDIA's name: DiskTensor}. `other`: how many things among them are no tensors."""


def _open(path, group):
    """One group ("model", "ema", "master", ...) of a file or all ranks' files."""
    files = _files(path, "model" if group in IN_ALL else "optim")
    ranks, others = zip(*[named_tensors(read_file(file), group, file) for file in files])
    for file, rank in zip(files, ranks):
        odd = [name for name in rank.keys() ^ ranks[0].keys()
               if name in rank or group in IN_ALL or tp_dim_of(name) is not None]
        if odd:
            raise ValueError(f"{path} does not hold the same named tensors in all of its parts "
                             f"(see {min(odd)} in {files[0].name} and {file.name})")
    mappings = file_mappings()
    weights = Weights({name: DiskTensor([rank[name] for rank in ranks if name in rank],
                                        tp_dim_of(name), mappings) for name in ranks[0]})
    weights.other = others[0]
    return weights


def open_weights(path: str | Path, ema: bool = False) -> Weights:
    """Weights of a released file, or of split files or a run's checkpoint (give the metadata file);
    with `ema` the averages, and the regular ones of what has none."""
    path = Path(path)
    if "files" in read_file(path) and (problem := damage(path, "_model_mp_")):
        raise ValueError(f"{path} is damaged: {problem}; use another checkpoint")
    weights = _open(path, "model")
    if ema:
        averaged = _open(path, "ema")
        if not averaged:
            raise ValueError(f"{path} holds no EMA weights; use the regular ones")
        weights.update(averaged)
    return weights


def has_ema(path: str | Path) -> bool:
    """Whether a file or a run's checkpoint holds EMA weights beside the regular ones."""
    return bool(_open(Path(path), "ema"))


# ---- loading -------------------------------------------------------------------------------------

# Constants and counters that nothing is computed with: in some files and not in others.
IDLE = re.compile(r"(^|\.)(pos_embedder\.(seq|dim_\w+_range)|accum_\w+)$")
# What a control file may lack, by the start of its names: it becomes the base's, or stays as new
# weights are. The head is never computed with. A fork's own parameters may be added here.
MAY_LACK = ("net.final_layer.",)


def _part(weights, part):
    """{NVIDIA's name without `base_model.`: DiskTensor} of the base, control or logvar in a file;
    the base and its logvar are below `base_model.`, or else are the file."""
    prefix, found = "logvar." if part == "logvar" else "net.", {}
    if part != "control":
        found = {name.removeprefix("base_model."): tensor for name, tensor in weights.items()
                 if name.startswith(f"base_model.{prefix}")}
    found = found or {name: t for name, t in weights.items() if name.startswith(prefix)}
    return {name: tensor for name, tensor in found.items() if not IDLE.search(name)}


def _targets(model, part):
    """{NVIDIA's name without `base_model.`: this rank's tensor} of a part of the model."""
    state = getattr(model, part).state_dict()
    return {to_nvidia(f"{part}.{n}").removeprefix("base_model."): t for n, t in state.items()}


def _check(targets, found, title):
    """ValueError, with the names, unless `found` holds exactly what `targets` want."""
    full = {}
    for name, tensor in targets.items():
        full[name] = tuple(n * (tp.size() if i == tp_dim_of(name) else 1)
                           for i, n in enumerate(tensor.shape))
    misshapen = [f"{name} {tuple(found[name].shape)}, expected {full[name]}"
                 for name in full.keys() & found.keys() if found[name].shape != full[name]]
    problems = {"missing": full.keys() - found.keys(), "unexpected": found.keys() - full.keys(),
                "misshapen": misshapen}
    lists = [f"{what} {len(names)}: {', '.join(sorted(names)[:20])}"
             for what, names in problems.items() if names]
    if lists:
        raise ValueError(f"{title}: {'; '.join(lists)}; give a file of the model that the config "
                         "describes")


def check_fits(model: torch.nn.Module, path: str | Path, part: str, ema: bool = False):
    """What `load` would copy: ({NVIDIA's name: tensor of the model}, {name: DiskTensor}, summary).

    The model may be on meta. ValueError lists missing, unexpected, misshapen and integer ones.
    """
    weights, source = open_weights(path, ema), f"{path} ({'EMA' if ema else 'regular'} weights)"
    found, wanted = _part(weights, part), _targets(model, part)
    if part == "logvar" and not found:
        raise ValueError(f"{path} holds no logvar.* weights; give a base that has them, or set "
                         "model.logvar to none, which trains on the plain EDM loss")
    kind = "control" if any(".zero_blocks." in name for name in found) else "base"
    views = "multi-view" if "net.view_embeddings.weight" in found else "single-view"
    title = f"{source} ({views} {kind} by its names) does not fit the {part} of this model"
    if not found:
        title = f"{source} holds nothing named net.*, but names like {min(weights)[:60]}"
    targets = {name: tensor for name, tensor in wanted.items()
               if name in found or part != "control" or not name.startswith(MAY_LACK)}
    _check(targets, found, title)
    if odd := [f"{n} as {t.dtype}" for n, t in found.items() if not t.dtype.is_floating_point]:
        raise ValueError(f"{source} holds {min(odd)}, one of {len(odd)} that are no floats; give "
                         "the weights as they were before a quantization")
    count = sum(tensor.shape.numel() for tensor in found.values())
    foreign = sorted(n for n in weights if not n.startswith(("net.", "logvar.", "base_model.")))
    idle = weights.other + len({*foreign, *filter(IDLE.search, weights)})
    summary = (f"loaded {part} from {source}: {len(found)} tensors, {count:,} parameters; passed "
               f"over {idle} entries that nothing is computed with" + "".join(
                   f", among them {name}" for name in foreign[:1]))
    if lacking := wanted.keys() - targets.keys():
        summary += f"; it lacks {len(lacking)} tensors, among them {min(lacking)}"
    return targets, found, summary


@torch.no_grad()
def load(model: torch.nn.Module, path: str | Path, part: str, ema: bool = False):
    """Fill model.base, .control or .logvar (`part`): each rank its slices, cast to our dtype.

    What a control file may lack and the base has becomes the base's, which is loaded before.
    """
    targets, found, summary = check_fits(model, path, part, ema)
    for name, tensor in targets.items():
        tensor.copy_(found[name].read(tp.rank(), tp.size()))
    if part == "control":
        base = _targets(model, "base")
        for name, tensor in _targets(model, "control").items():
            if name not in targets and name in base:
                tensor.copy_(base[name])
    if tp.world_rank() == 0:
        print(summary)


def identify_weights(path: str | Path, part: str, memory: Path | None = None) -> dict:
    """{"file", "size", "sha256"} of the base (with its logvar) or control in a file."""
    path, weights = Path(path).absolute(), open_weights(path)
    found = _part(weights, part) | (_part(weights, "logvar") if part == "base" else {})
    return identify([path, *(file for file in _files(path) if file != path)], found, memory)


def check_same_base(saved: dict, now: dict):
    """ValueError unless two results of `identify_weights` are of the same weights."""
    key = "sha256" if "sha256" in saved else "size"  # older runs knew less of their base
    if saved[key] != now[key]:
        was, found = (f"{base['file']} ({base['size']} bytes, SHA-256 "
                      f"{base.get('sha256', 'unknown')[:12]})" for base in (saved, now))
        raise ValueError(f"this run was trained on the base {was}, not on {found}; set "
                         "checkpoint.base_path to the former or start another run")


# ---- a run's checkpoints -------------------------------------------------------------------------

# Step 1000 at tp=2, in checkpoints/; the first 14 letters are the step:
#     iter_000001000_model_mp_{0,1}.pt    weights and EMA of a tensor-parallel rank
#     iter_000001000_optim_mp_{0,1}.pt    its masters and optimizer state; rank 0 has the replicated
#     iter_000001000.pt                   the metadata, last: all files by size and checksum, the
#                                         optimizer's single values, what the run is bound to
IN_ALL = ("model", "ema")  # groups whose replicated tensors are in every rank's file, as NVIDIA's
METADATA = f"iter_{9 * '[0-9]'}.pt"
RETRY_S = 5  # to the second attempt at a file, four times as long to each further one
VISIBLE_S = 60  # until a shared file system shows one machine what another has written


class Save:
    """A checkpoint on its way to the disk. Every rank of the world has one and calls it alike.

    A thread writes this rank's files; on world rank 0 then the metadata file, once the files of all
    ranks are there. Threads cannot use the group, so they meet on the disk: a file with its final
    name is whole. What went wrong is exchanged by `poll`, between the steps.

    record: for the metadata file; {}: a replica, None: no rank writes. stall: seconds that training
    waited for the copy to the host. ended: nothing is left to do.
    failed: why it was given up, or None; like `ended` the same on every rank.
    """

    def __init__(self, metadata, record=None, host=None, stall=0.0, retries=0, keep=None):
        self.step, self.stall, self.metadata = int(metadata.stem[5:]), stall, metadata
        self.record, self.host, self.retries, self.keep = record, host, retries, keep
        self.rank, self.leads = tp.rank(), tp.world_rank() == 0
        self.ended, self.failed = record is None, None
        # what the thread tells the steps, sentences and a last one; and they the thread
        self.news, self.error = deque(), None
        self.stop, self.deadline = threading.Event(), math.inf
        self.thread = threading.Thread(target=self._write_all)
        if host:
            self.thread.start()

    def poll(self) -> list[str]:
        """Once a step: what has gone wrong on any rank since the last time, in sentences."""
        return [] if self.ended else self.settle(tp.from_all(self.report()))

    def report(self) -> tuple:
        """What the other ranks need to know of this one: (done, error, news)."""
        done = not self.thread.is_alive()
        return done, self.error, [self.news.popleft() for _ in range(len(self.news))]

    def settle(self, reports: list[tuple]) -> list[str]:
        """Draw the same conclusion on every rank from the reports of all."""
        done, errors, news = zip(*reports)
        self.failed = next(filter(None, errors), None)
        self.ended = all(done) or self.failed is not None
        if self.failed:
            self.stop.set()
        elif all(done[1:]):  # only rank 0 still writes: what it waits for must soon be visible
            self.deadline = min(self.deadline, time.monotonic() + VISIBLE_S)
        return [sentence for sentences in news for sentence in sentences]

    def finish(self):
        """Wait until the checkpoint is on disk or given up, however long that takes."""
        while not self.ended:
            for sentence in self.poll():
                if self.leads:
                    warnings.warn(sentence)
            time.sleep(0.02)

    def _write_all(self):
        try:
            # NVIDIA's files have the names of averages with dashes
            averaged = {name.replace(".", "-"): t for name, t in self.host["ema"].items()}
            weights = {"model": self.host["model"], "ema": averaged}
            optim = {group: tensors for group, tensors in self.host.items() if group not in weights}
            files = self._persist(f"_model_mp_{self.rank}", weights)
            files |= self._persist(f"_optim_mp_{self.rank}", optim)
            if self.leads:
                self._complete(files)
        except Exception as error:  # told to training by the next report
            self.error = str(error)

    def _persist(self, ending, content):
        """Write a file, again after a while if that fails; {its name: size and checksum}."""
        path = self.metadata.with_stem(self.metadata.stem + ending)
        for attempt in itertools.count():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                return {path.name: write(path, content)}
            except (OSError, RuntimeError) as error:
                why = getattr(error, "strerror", None) or str(error).splitlines()[0]
                problem = f"step {self.step}: {path} could not be written ({why})"
            if attempt >= self.retries or self.stop.is_set():
                raise RuntimeError(problem)
            pause = RETRY_S * 4**attempt
            self.news.append(f"{problem}; training goes on, next attempt in {pause:g} s")
            self.stop.wait(pause)

    def _complete(self, files):
        """The metadata file, when the files of all ranks are there, and what follows from it."""
        paths = [self.metadata.with_stem(f"{self.metadata.stem}_{kind}_mp_{rank}")
                 for rank in range(self.record["tp_size"]) for kind in ("model", "optim")]
        while lacking := [path for path in paths if not path.exists()]:
            if not threading.main_thread().is_alive():  # training was left by an error
                self.deadline = min(self.deadline, time.monotonic() + VISIBLE_S / 2)
            if self.stop.is_set() or time.monotonic() > self.deadline:
                raise RuntimeError(f"step {self.step}: {lacking[0]} has not come; its rank failed "
                                   "or writes to another disk, and all need the same")
            time.sleep(0.02)
        others = [path for path in paths if path.name not in files]
        files |= dict(zip([path.name for path in others], fingerprints(others)))
        self._persist("", self.record | {"files": files})
        try:
            self.metadata.with_name("latest_checkpoint.txt").write_text(self.metadata.name)
            self.news += _prune(self.metadata, *self.keep)
        except OSError as error:
            self.news.append(f"step {self.step} is saved, but {error.filename}: {error.strerror}")


def save(run_dir: str | Path, step: int, state: dict, meta: dict, keep_last: int = 3,
         keep_every: int = 0, retries: int = 0, previous: Save | None = None) -> Save:
    """Copy the state to the host and write `run_dir/checkpoints/iter_*` in the background.

    Every rank calls it. state: {"model" (control, logvar and what else is trained), "ema",
    "master", the optimizer's own: {our name: this rank's tensor}}. meta: JSON values, with
    "config_digest" and "seq_length" (the largest position table's). previous: the save before,
    which is waited for and whose memory is used again. A step saved intact is not written again.
    """
    json.dumps(meta)  # TypeError now, not at resume, for what is no plain value
    if previous and not previous.ended:
        if tp.world_rank() == 0:
            warnings.warn(f"step {step}: the save of step {previous.step} still runs; waiting")
        previous.finish()
    metadata = Path(run_dir) / "checkpoints" / f"iter_{step:09d}.pt"
    record = None if tp.from_rank0(lambda: _make_way(metadata)) else {}
    if record is None or tp.dp_rank() != 0:
        return Save(metadata, record)
    began = time.perf_counter()
    host = _to_host(state, previous.host or {} if previous else {})
    host["model"][SEQ] = torch.arange(meta["seq_length"], dtype=torch.float32)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    stall = time.perf_counter() - began
    record = {"iteration": step, "tp_size": tp.size(), "config_digest": meta["config_digest"],
              "extra": meta}
    return Save(metadata, record, host, stall, retries, (keep_last, keep_every))


def _make_way(metadata):
    """Whether the step is on disk, intact; if not, no old file may be taken for a new one."""
    if metadata.exists() and not damage(metadata):
        return True
    if stale := sorted(metadata.parent.glob(f"{metadata.stem}*")):
        warnings.warn(f"{metadata.stem} is saved anew in place of {len(stale)} files of a save "
                      "that was damaged or never completed")
    with contextlib.suppress(OSError):  # a disk that refuses this refuses the new files, too
        for path in stale:
            path.unlink()
    return False


def _to_host(state, spare):
    """{group: {NVIDIA's name: copy}}, in the pinned tensors of `spare`: new ones cost seconds."""
    host = {}
    for group, tensors in state.items():
        old, host[group] = spare.pop(group, {}), {}
        for name, tensor in tensors.items():
            name, room = to_nvidia(name), old.pop(to_nvidia(name), None)
            if group not in IN_ALL and tp.rank() > 0 and tp_dim_of(name) is None:
                continue
            if room is None or (room.shape, room.dtype) != (tensor.shape, tensor.dtype):
                room = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            host[group][name] = room.copy_(tensor.detach(), non_blocking=True)
    return host


def _prune(newest, keep_last, keep_every):
    """Remove older checkpoints but those to keep, and failed saves, of which it returns word."""
    complete = [path.stem for path in sorted(newest.parent.glob(METADATA)) if path <= newest]
    kept = complete[-keep_last:]
    kept += [stem for stem in complete if keep_every and int(stem[5:]) % keep_every == 0]
    said = set()
    for path in sorted(newest.parent.glob("iter_*")):  # a metadata file before those it lists
        if (stem := path.name[:14]) < newest.stem and stem not in kept:
            path.unlink()
            if stem not in complete and path.suffix != ".tmp":
                said.add(f"removed {path.with_name(stem)}*, of a save that was never completed")
    return sorted(said)


def damage(metadata: Path, kind: str = "") -> str | None:
    """What is wrong with a run's checkpoint (its files named with `kind`), in words, or None."""
    try:
        record = read_file(metadata)
        check_records(metadata)
        if "files" not in record or metadata.name != f"iter_{record['iteration']:09d}.pt":
            return f"{metadata.name} has been altered"
        names = [name for name in record["files"] if kind in name]
        for name, now in zip(names, fingerprints([metadata.with_name(name) for name in names])):
            written = record["files"][name]
            if now != written:
                return f"{name} is not what was written ({now}, not {written})"
    except (ValueError, OSError, TypeError, LookupError) as error:
        return str(error)
    return None


def find_resume(run_dir: str | Path) -> tuple[int, Path] | None:
    """(step, metadata path) of the newest complete and intact checkpoint, None before any.

    The directory decides, not latest_checkpoint.txt. Warns about what it passes over, which stays
    on disk; ValueError if nothing is left.
    """
    folder, passed, intact = Path(run_dir) / "checkpoints", [], None
    latest = folder / "latest_checkpoint.txt"
    said = latest.read_text(errors="replace").strip() if latest.is_file() else None
    for path in sorted(folder.glob(METADATA), reverse=True):
        if not (problem := damage(path)):
            intact = path
            break
        passed.append(problem)
        warnings.warn(f"passing over {path.name}: {problem}")
    parts = Counter(path.name[:14] for path in folder.glob("iter_*_mp_*.pt"))
    for stem in sorted(stem for stem in parts if not (folder / f"{stem}.pt").exists()):
        warnings.warn(f"{folder / stem}*: {parts[stem]} whole files of a save that ended before "
                      "its metadata file; they stay until that step or a later one is saved")
    if intact:
        if said != intact.name:
            warnings.warn(f"latest_checkpoint.txt says {said!r:.40}; the newest intact one is "
                          f"{intact.name}")
        return int(intact.stem[5:]), intact
    if passed or said is not None:
        raise ValueError(f"no intact checkpoint is left in {folder} "
                         f"({'; '.join(passed) or 'no metadata files'}); restore one, or move the "
                         "folder away to start from the beginning")
    return None


def optimizer_state(metadata: str | Path) -> tuple[list[str], dict]:
    """The optimizer's groups in a checkpoint (exp_avg, ...), and save's meta, with its scalars."""
    path, meta = Path(metadata), read_file(Path(metadata))["extra"]
    if "optimizer" not in meta:  # of a run before other optimizers were saved
        meta["optimizer"] = {"optimizer": "AdamW", "step": float(meta["optimizer_steps"])}
    groups = read_file(path.with_name(f"{path.stem}_optim_mp_0.pt"))
    return [group for group in groups if group != "master"], meta


def resume(metadata: str | Path, into: dict[str, dict[str, torch.Tensor]]):
    """Fill `into` {"ema" | "master" | the optimizer's: {our name: this rank's tensor}} from a
    checkpoint of any tp. ValueError unless names and shapes fit exactly."""
    for group, tensors in into.items():
        targets, found = {to_nvidia(n): t for n, t in tensors.items()}, _open(Path(metadata), group)
        _check(targets, found, f"the {group} of {metadata} does not fit this run")
        for name, tensor in targets.items():
            tensor.copy_(found[name].read(tp.rank(), tp.size()))


# ---- split and merge -----------------------------------------------------------------------------

def split(path: str | Path, size: int = 8, suffix: str = "pt"):
    """FILE (its regular weights) -> checkpoints_tp/{stem}_model_mp_{r} beside it, metadata last."""
    path, weights = Path(path), open_weights(path)
    odd = [f"{name} {tuple(t.shape)}" for name, t in weights.items()
           if size < 1 or t.dim is not None and t.shape[t.dim] % size]
    if odd:
        raise ValueError(f"{path} cannot be split over tp {size}, which does not divide {odd[0]}")
    folder = path.parent / "checkpoints_tp"
    folder.mkdir(exist_ok=True)
    for stale in [*folder.glob(f"{path.stem}.pt"), *folder.glob(f"{path.stem}_model_mp_*")]:
        stale.unlink()
    for rank in range(size):
        shard = {name: tensor.read(rank, size) for name, tensor in weights.items()}
        output = folder / f"{path.stem}_model_mp_{rank}.{suffix}"
        write(output, {"model": shard, "ema": None} if suffix == "pt" else shard)
        del shard  # before the next one is read
    write(folder / f"{path.stem}.pt", {"grad_scaler": {}, "iteration": 0})
    print(f"split {path} ({len(weights)} tensors) into {size} files in {folder}")


def merge(path: str | Path, output_directory: str | None = None, include_base_model: bool = False,
          suffix: str = "pt"):
    """Split files or a run's checkpoint -> {stem}_{reg,ema}_model, flat, in fsdp_checkpoints/.

    EMA if there is one. What a run trained of the base is in both; include_base_model adds the rest
    of `base_model.*`, from the file or from the base that the run was trained on.
    """
    path = Path(path)
    regular, averaged = check_whole(open_weights(path), path), _open(path, "ema")
    if averaged and not include_base_model:  # a run of cosmos-transfer1 holds its frozen base
        regular = {name: tensor for name, tensor in regular.items()
                   if not name.startswith("base_model.") or name in averaged}
    base = _base_of(path, regular) if include_base_model else {}
    folder = Path(output_directory or path.parent.parent / "fsdp_checkpoints")
    folder.mkdir(parents=True, exist_ok=True)
    for kind in ("reg", "ema") if averaged else ("reg",):
        weights = base | regular | (averaged if kind == "ema" else {})
        output = folder / f"{path.stem}_{kind}_model.{suffix}"
        write(output, {name: tensor.read() for name, tensor in weights.items()})
        print(f"wrote {output}: {len(weights)} tensors, {output.stat().st_size:,} bytes")
        if suffix == "pt":
            print(f'  for the control in the spec JSON:  "ckpt_path": "{output.absolute()}"')
    if suffix != "pt":
        print("NVIDIA's inference reads .pt files alone: merge with --format pt for it")


def _base_of(path, regular):
    """What a file's weights lack of base_model.*: {}, or the base that the run was trained on."""
    saved = read_file(path).get("extra", {}).get("base")
    if saved is None:
        if not any(name.startswith("base_model.") for name in regular):
            raise ValueError(f"{path} does not say which base it was trained on; merge without "
                             "--include-base-model")
        return {}
    if not Path(saved["file"]).exists():
        raise ValueError(f"the base {saved['file']} of this run is not there; merge without "
                         "--include-base-model")
    check_same_base(saved, identify_weights(saved["file"], "base"))
    weights = open_weights(saved["file"])
    nested = {name: t for name, t in weights.items() if name.startswith("base_model.")}
    return nested or {f"base_model.{name}": t for name, t in weights.items()}


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0; 1 if verify finds another file; 2 for a mistake that stderr explains."""
    parser = argparse.ArgumentParser(description="split, merge and verify checkpoints, on the CPU")
    commands = parser.add_subparsers(dest="command", required=True)
    splitter = commands.add_parser("split", help="a file to tp files, in checkpoints_tp/ beside it")
    splitter.add_argument("--tp", type=int, default=8, dest="size")
    merger = commands.add_parser("merge", help="a run's checkpoint to files in fsdp_checkpoints/")
    merger.add_argument("--output-directory")
    merger.add_argument("--include-base-model", action="store_true", help="add base_model.*")
    for command, file in ((splitter, "FILE"), (merger, "ITER.pt")):
        command.add_argument("path", metavar=file)
        command.add_argument("--format", choices=("pt", "safetensors"), default="pt", dest="suffix")
    verifier = commands.add_parser("verify", help="NVIDIA's MD5 sums of the files a config names")
    verifier.add_argument("config", metavar="CONFIG")
    verifier.add_argument("overrides", metavar="key.sub=value", nargs="*")
    options = vars(parser.parse_args(arguments))
    command = options.pop("command")
    try:
        if command == "verify":
            from configs.schema import load_config  # which needs the model
            return verify(load_config(options["config"], options["overrides"]))
        {"split": split, "merge": merge}[command](**options)
    except (ValueError, OSError, RuntimeError, safetensors.SafetensorError) as error:
        print(f"convert.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
