"""Names and files: NVIDIA's names, split, merge, save, resume. CPU only; nothing in a file is ever executed.

    python convert.py split FILE [--tp 8] [--format pt|safetensors]
    python convert.py merge RUN/checkpoints/iter_000000100.pt [--output-directory D] [--include-base-model]
"""

import argparse
import ctypes
import hashlib
import io
import json
import math
import mmap
import os
import pickle
import re
import sys
import time
import warnings
import zipfile
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch

import tp

# ---- names (SPEC 3) --------------------------------------------------------------------------------------------------

SEQ = "net.pos_embedder.seq"  # a constant of the files, in no module of ours
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
    blocks.*.{self_attn,cross_attn,mlp}.ada.{down,up}.weight  blocks.block*.blocks.{0,1,2}.adaLN_modulation.{1,2}.weight
    blocks.*.{self_attn,cross_attn}.{q,k,v,out}.weight  blocks.block*.blocks.{0,1}.block.attn.to_{q,k,v,out}.0.weight
    blocks.*.{self_attn,cross_attn}.{q,k}_norm.weight  blocks.block*.blocks.{0,1}.block.attn.to_{q,k}.1.weight"""
NAMES = re.sub(r"\n *(\S+) *(\S+)", r"\n{control,base}.\1  {net,base_model.net}.\2", DIT) + """
    control.hint_embed.weight  net.x_embedder2.proj.1.weight
    control.hint_encoder.{0,2,4,6,8,10,12,14}.{weight,bias}  net.input_hint_block.{0,2,4,6,8,10,12,14}.{weight,bias}
    control.zero_linears.*.{weight,bias}  net.zero_blocks.block*.{weight,bias}
    logvar.{freqs,phases,weight}  logvar.{0.freqs,0.phases,1.weight}"""
INDEX = re.compile(r"((?<=\.blocks\.)|(?<=\.zero_linears\.)|(?<=\.block))(0|[1-9]\d*)(?=\.)")


def _expand(ours, theirs):
    """Pairs of names from one line of the table: the n-th of {alternatives} on one side is the n-th on the other."""
    if "{" not in ours:
        return [(ours, theirs)]
    (a, mine, b), (c, yours, d) = (re.split("{(.*?)}", side, maxsplit=1) for side in (ours, theirs))
    pairs = zip(mine.split(","), yours.split(","), strict=True)
    return [pair for x, y in pairs for pair in _expand(a + x + b, c + y + d)]


OURS = dict(pair for line in NAMES.strip().splitlines() for pair in _expand(*line.split()))
THEIRS = {theirs: ours for ours, theirs in OURS.items()}


def to_nvidia(name: str, table: dict[str, str] = OURS) -> str:
    """Our full parameter name -> NVIDIA's. ValueError for a name that is none of ours."""
    index = INDEX.search(name)
    key = name if index is None else f"{name[:index.start()]}*{name[index.end():]}"
    if key not in table or "*" in name:
        raise ValueError(f"{name} is no parameter of the model or of a released checkpoint")
    return table[key].replace("*", index[0] if index else "")


def from_nvidia(name: str) -> str:
    """NVIDIA's full name -> ours; `base_model.logvar.*` is the same `logvar`. ValueError for an unknown name."""
    return to_nvidia(name.replace("base_model.logvar.", "logvar."), THEIRS)


def tp_dim_of(name: str) -> int | None:
    """Dimension along which the tensor of this NVIDIA name is split over tensor-parallel ranks; None if replicated."""
    if name.endswith(("to_q.0.weight", "to_k.0.weight", "to_v.0.weight", "layer1.weight")):
        return 0
    return 1 if name.endswith(("to_out.0.weight", "layer2.weight")) else None


# ---- reading ---------------------------------------------------------------------------------------------------------

LIBC = ctypes.CDLL(None)
BAND = 1 << 24  # bytes that are copied before their pages are given back, so that resident memory is that of the copies
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}


class DiskTensor:
    """A tensor of a mapped file, or one that is cut along `dim` over the mapped files of several ranks: its pieces."""

    def __init__(self, pieces, dim):
        self.pieces, self.dim, self.dtype = pieces, dim, pieces[0].dtype
        self.shape = tuple(sum(p.shape[i] for p in pieces) if i == dim else n for i, n in enumerate(pieces[0].shape))

    def read(self, rank: int = 0, size: int = 1, out: torch.Tensor | None = None) -> torch.Tensor:
        """Rank's slice along `dim` (all of it if replicated), in memory of its own or in `out` (any device, dtype)."""
        dim, rank, size = (0, 0, 1) if self.dim is None else (self.dim, rank, size)
        if out is None:
            out = torch.empty([n // size if i == dim else n for i, n in enumerate(self.shape)], dtype=self.dtype)
        common = math.gcd(size, len(self.pieces))
        chunks = [chunk for piece in self.pieces for chunk in torch.atleast_1d(piece).chunk(size // common, dim)]
        count = len(self.pieces) // common  # chunks of a slice
        for target, chunk in zip(torch.atleast_1d(out).chunk(count, dim), chunks[rank * count:]):
            rows = max(1, BAND // max(1, chunk.stride(0) * chunk.element_size()))
            for band, mapped in zip(target.split(rows), chunk.split(rows)):
                band.copy_(mapped)
                # Nobody writes to this private mapping of a file, so pages that are dropped come back from the file.
                start, length = mapped.data_ptr(), mapped.stride(0) * mapped.shape[0] * mapped.element_size()
                skew = start % mmap.PAGESIZE
                LIBC.madvise(ctypes.c_void_p(start - skew), ctypes.c_size_t(length + skew), mmap.MADV_DONTNEED)
        return out


def _map(path, verify=False):
    """Content of a .pt or .safetensors file, tensors mapped. ValueError if it is damaged or not just data."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        if path.suffix == ".safetensors":
            data = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)
            start = 8 + int.from_bytes(data[:8].numpy().tobytes(), "little")
            header = json.loads(data[8:start].numpy().tobytes())
            return {name: data[start:][slice(*entry["data_offsets"])].view(DTYPES[entry["dtype"]]).view(entry["shape"])
                    for name, entry in header.items() if name != "__metadata__"}
        if verify and zipfile.ZipFile(path).testzip():  # torch.load does not look at the archive's checksums
            raise ValueError("a checksum is wrong")
        with torch.serialization.safe_globals([io.BytesIO]):  # `_extra_state` may hold one
            return dict(torch.load(path, map_location="cpu", mmap=True, weights_only=True))
    except Exception as error:  # there is no end to the ways in which parsing an altered file can fail
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if isinstance(error, pickle.UnpicklingError):
            reason = "refused: it holds more than tensors and plain containers, and opening it could run code"
        raise ValueError(f"{path} is not a readable checkpoint ({reason}); copy or download it again") from error


def _open(path, group, kind="model"):
    """One group ("model", "ema", "master", ...) of a file, or of the `kind` files of all ranks: {name: DiskTensor}."""
    def grouped(content):
        return {"model": content} if any(isinstance(t, torch.Tensor) for t in content.values()) else content

    contents = [grouped(_map(path))]
    if not isinstance(contents[0].get("model"), dict):  # a metadata file
        found = {file.stem: file for file in path.parent.iterdir() if file.suffix in (".pt", ".safetensors")
                 and file.stem.startswith(f"{path.stem}_{kind}_mp_")}
        stems = [f"{path.stem}_{kind}_mp_{rank}" for rank in range(contents[0].get("tp_size") or len(found) or 1)]
        if lacking := [stem for stem in stems if stem not in found]:
            raise FileNotFoundError(f"{path} needs {lacking[0]}.pt, which is not there")
        contents = [grouped(_map(found[stem])) for stem in stems]
    ranks = [{name.replace("-", "."): t for name, t in (content.get(group) or {}).items()
              if not name.endswith("_extra_state")} for content in contents]
    for name, tensor in ranks[0].items():
        if not isinstance(tensor, torch.Tensor) or any(rank.keys() != ranks[0].keys() for rank in ranks):
            raise ValueError(f"{path} does not hold the same named tensors in all of its parts (see {name})")
    dims = {name: tp_dim_of(name) for name in ranks[0]}
    return {name: DiskTensor([r[name] for r in ranks[:1 if dim is None else None]], dim) for name, dim in dims.items()}


class Weights(dict):
    """NVIDIA's flat names -> DiskTensor; `source`: which file, EMA or regular weights."""


def open_weights(path: str | Path, ema: bool = False) -> Weights:
    """Weights of a released file, or of any tp's split files or run's checkpoint (give the metadata file).
    EMA weights come with the regular ones of what is never trained. ValueError or FileNotFoundError if that fails."""
    if "files" in _map(path := Path(path)) and (problem := damage(path, "_model_mp_")):
        raise ValueError(f"{path} is damaged: {problem}; use another checkpoint")
    weights = Weights(_open(path, "model"))
    weights.source = f"{path} ({'EMA' if ema else 'regular'} weights)"
    if ema:
        averaged = _open(path, "ema")
        if lost := [n for n in weights.keys() - averaged.keys() if not n.startswith((SEQ, "net.final_", "logvar."))]:
            raise ValueError(f"the EMA weights of {path} lack {_some(sorted(lost))}; use the regular ones")
        weights.update(averaged)
    return weights


def _some(lines, limit=20):
    return ", ".join(lines[:limit]) + (f" and {len(lines) - limit} more" if len(lines) > limit else "")


def _fill(targets, found, title):
    """Copy `found` into targets {NVIDIA's name: (local tensor, tp_dim)}: all of them, or ValueError."""
    full = {name: tuple(n * tp.size() if i == dim else n for i, n in enumerate(tensor.shape))
            for name, (tensor, dim) in targets.items()}
    problems = {"missing": full.keys() - found.keys(), "unexpected": found.keys() - full.keys(),
                "misshapen": [f"{name} {found[name].shape}, expected {full[name]}"
                              for name in full.keys() & found.keys() if found[name].shape != full[name]]}
    if any(problems.values()):
        raise ValueError(f"{title}: " + "; ".join(f"{problem} {len(names)}: {_some(sorted(names))}"
                                                  for problem, names in problems.items() if names)
                         + "; give a file of the model that the config describes")
    for name, (tensor, _) in targets.items():
        if not tensor.is_meta:
            found[name].read(tp.rank(), tp.size(), tensor.detach())


def load(module_part: torch.nn.Module, weights: Weights, what: str):
    """Fill model.base, .control or .logvar (`what`), base and logvar from below `base_model.` where the file has that.
    Each rank reads its slices, cast to the model's dtype; a model on meta is only checked. ValueError lists all missing,
    unexpected and misshapen names."""
    plain = "logvar." if what == "logvar" else "net."
    nested = what != "control" and any(name.startswith("base_model." + plain) for name in weights)
    above = "base_model." if nested else ""
    found = {name.removeprefix(above): t for name, t in weights.items() if name.startswith(above + plain)}
    targets = {to_nvidia(f"{what}.{name}").removeprefix("base_model."): (tensor, getattr(tensor, "tp_dim", None))
               for name, tensor in module_part.state_dict(keep_vars=True).items()}
    if what != "logvar" and found.pop(SEQ, None) is None:
        targets[SEQ] = (torch.empty(0), None)  # of no use to us, but every such file has one
    kind = "control" if any(".zero_blocks." in name for name in found) else "base"
    views = "multi-view" if "net.view_embeddings.weight" in found else "single-view"
    _fill(targets, found, f"{weights.source} ({views} {kind} by its names) does not fit the {what} of this model")
    if tp.world_rank() == 0 and not next(module_part.parameters()).is_meta:
        count = sum(math.prod(tensor.shape) for tensor in found.values())
        print(f"loaded {what} from {weights.source}: {len(found)} tensors, {count:,} parameters")


def copy_base_to_control(model: torch.nn.Module):
    """Start the control branch from the loaded base: every parameter that they have in common."""
    base = dict(model.base.named_parameters())
    for name, parameter in model.control.named_parameters():
        if name in base:
            parameter.detach().copy_(base[name].detach())


def base_identity(path: str | Path) -> dict:
    """{"file", "size" in bytes, "digest"} of a base checkpoint, the same however it is split or stored.
    The digest is of the names, shapes, dtypes and first and last elements of all tensors."""
    weights = open_weights(path)
    above = "base_model." if any(name.startswith("base_model.") for name in weights) else ""
    digest, size = hashlib.sha256(), 0
    for name in sorted(name for name in weights if name.startswith(above)):
        tensor = weights[name]
        digest.update(f"{name.removeprefix(above)} {tensor.shape} {tensor.dtype}".encode())
        for sample in (tensor.pieces[0].flatten()[:4], tensor.pieces[-1].flatten()[-4:]):
            digest.update(sample.view(torch.uint8).numpy().tobytes())
        size += sum(piece.nbytes for piece in tensor.pieces)
    return {"file": str(path), "size": size, "digest": digest.hexdigest()}


def check_base(saved: dict, now: dict):
    """ValueError unless both `base_identity` dicts are of the same weights."""
    was, found = (f"{base['file']} ({base['size']} bytes, digest {base['digest'][:12]})" for base in (saved, now))
    if saved["digest"] != now["digest"]:
        raise ValueError(f"this run was trained on the base {was}, not on {found}; set checkpoint.base_path to the "
                         "former or start another run")


# ---- a run's checkpoints ---------------------------------------------------------------------------------------------

RANK_TIMEOUT = 1800.0  # seconds that rank 0 waits for the files of the others
METADATA = re.compile(r"iter_(\d{9,})\.pt")


@dataclass
class Save:
    """A save under way. `stall`: seconds that training waited for the host copy, which the next save fills again."""

    step: int
    stall: float = 0.0
    host: dict | None = None
    future: Future | None = None

    def wait(self):
        """Until the files are on disk. RuntimeError if that failed; the checkpoint before is then untouched."""
        try:
            self.future and self.future.result()
        except (OSError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise RuntimeError(f"the checkpoint of step {self.step} could not be written ({reason}); earlier ones are "
                               "intact: make room or repair the disk, then rerun the same command") from error


def save(run_dir: str | Path, step: int, state: dict, meta: dict, keep_last: int = 3, keep_every: int = 0,
         previous: Save | None = None) -> Save:
    """Copy the state to the host, write `run_dir/checkpoints/iter_*` (SPEC 8) in the background. Every rank calls it.

    state: {"model": {our name: this rank's tensor} of control and logvar with buffers, "ema": the same of what is
    trained, "optim": {our name: {"master", "exp_avg", "exp_avg_sq"}}}. meta: JSON values, with "config_digest" and
    "seq_length" (the largest position table's). previous: the save before. A step saved intact is not written again.
    """
    if keep_last < 1 or not {"config_digest", "seq_length"} <= meta.keys():
        raise ValueError(f"keep_last {keep_last} must be 1 or more, and meta ({', '.join(meta)}) must have "
                         "config_digest and seq_length")
    json.dumps(meta)  # TypeError here for what is no plain value, rather than a file that cannot be opened at resume
    previous = previous or Save(step)
    if previous.future and not previous.future.done():
        warnings.warn(f"step {step}: the save of step {previous.step} is still running, waiting for it")
    previous.wait()
    metadata = Path(run_dir) / "checkpoints" / f"iter_{step:09d}.pt"
    if tp.world_rank() == 0:
        metadata.parent.mkdir(parents=True, exist_ok=True)
        if damage(metadata):  # or not there: what a failed attempt at this very step left goes
            for path in metadata.parent.glob(f"{metadata.stem}[._]*"):
                path.unlink()
    tp.barrier()
    if tp.dp_rank() != 0 or metadata.exists():
        return Save(step, host=previous.host)
    began = time.perf_counter()
    model = {to_nvidia(name): tensor for name, tensor in state["model"].items()}
    model[SEQ] = torch.arange(meta["seq_length"], dtype=torch.float32)
    ema = {to_nvidia(name).replace(".", "-"): tensor for name, tensor in state["ema"].items()}
    optim = {kind: {to_nvidia(name): kinds[kind] for name, kinds in state["optim"].items()}
             for kind in ("master", "exp_avg", "exp_avg_sq")}
    host = _host_copy({"model": {"model": model, "ema": ema}, "optim": optim}, previous.host)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    stall = time.perf_counter() - began
    record = {"iteration": step, "tp_size": tp.size(), "config_digest": meta["config_digest"], "extra": meta}
    worker = ThreadPoolExecutor(1)
    future = worker.submit(_write_checkpoint, metadata, host, tp.rank(), record, keep_last, keep_every)
    worker.shutdown(wait=False)
    return Save(step, stall, host, future)


def _host_copy(node, old):
    """The same tree in (pinned) host memory, every tensor with its own storage; reuses the memory of the last save."""
    if isinstance(node, dict):
        return {key: _host_copy(value, old and old[key]) for key, value in node.items()}
    host = torch.empty(node.shape, dtype=node.dtype, pin_memory=node.is_cuda) if old is None else old
    return host.copy_(node.detach(), non_blocking=True)


def _write(path, content):
    """Text, tensors for .safetensors or anything for torch.save: to a temporary name, flushed to disk, then renamed."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        if isinstance(content, str):
            temporary.write_text(content)
        elif path.suffix == ".safetensors":
            safetensors.torch.save_file(content, temporary, metadata={"format": "pt"})
        else:
            torch.save(content, temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)  # the new name has to reach the disk, too
        os.fsync(folder)
        os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def _fingerprint(path):
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return {"size": path.stat().st_size, "checksum": checksum}


def _write_checkpoint(metadata, host, rank, record, keep_last, keep_every):
    """This rank's files; on rank 0 then the metadata, once the files of all ranks are there: a file with its final name
    is complete. Ranks meet in the file system because a thread must not use the collectives of training."""
    for kind, content in host.items():
        _write(metadata.with_name(f"{metadata.stem}_{kind}_mp_{rank}.pt"), content)
    if rank == 0:
        paths = [metadata.with_name(f"{metadata.stem}_{k}_mp_{r}.pt") for r in range(record["tp_size"]) for k in host]
        deadline = time.monotonic() + RANK_TIMEOUT
        while late := [path.name for path in paths if not path.exists()]:
            if time.monotonic() > deadline:
                raise TimeoutError(f"no {late[0]} after {RANK_TIMEOUT:.0f} s: that rank failed or has another disk")
            time.sleep(0.05)
        _write(metadata, record | {"files": {path.name: _fingerprint(path) for path in paths}})
        _write(metadata.with_name("latest_checkpoint.txt"), metadata.name)
        _prune(metadata, keep_last, keep_every)


def _prune(newest, keep_last, keep_every):
    """Remove what is older than `newest`, failed saves too, but the last checkpoints and every keep_every-th step."""
    steps = {path: int(m[1]) for path in newest.parent.iterdir() if (m := re.match(r"iter_(\d{9,})[._]", path.name))}
    complete = sorted(step for path, step in steps.items() if METADATA.fullmatch(path.name) and step <= steps[newest])
    kept = complete[-keep_last:] + [step for step in complete if keep_every and step % keep_every == 0]
    for path in sorted(steps, key=lambda path: len(path.name)):  # metadata, the shortest names, first
        if steps[path] <= steps[newest] and steps[path] not in kept:
            path.unlink()


def damage(metadata: Path, kind: str = "") -> str | None:
    """What is wrong with a run's checkpoint (its files whose names contain `kind`), in words; None if it is intact."""
    try:
        record = _map(metadata, verify=True)
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    if "files" not in record or metadata.name != f"iter_{record['iteration']:09d}.pt":
        return f"{metadata.name} has been altered"
    for name, expected in record["files"].items():
        if kind in name and not (path := metadata.with_name(name)).exists():
            return f"{name} is missing"
        if kind in name and _fingerprint(path) != expected:
            return f"{name} ({path.stat().st_size} bytes) is not what was written ({expected['size']} bytes)"
    return None


def find_resume(run_dir: str | Path) -> tuple[int, Path] | None:
    """(step, metadata path) of the newest complete and intact checkpoint, None before the first one.
    The directory decides, not latest_checkpoint.txt. Warns about what it passes over; ValueError if nothing is left."""
    folder, passed = Path(run_dir) / "checkpoints", []
    names = os.listdir(folder) if folder.is_dir() else []
    latest = (folder / "latest_checkpoint.txt").read_bytes() if "latest_checkpoint.txt" in names else None
    for step, name in sorted(((int(m[1]), m[0]) for m in map(METADATA.fullmatch, names) if m), reverse=True):
        if not (problem := damage(folder / name)):
            if (latest or b"").strip() != name.encode():
                warnings.warn(f"latest_checkpoint.txt says {(latest or b'')[:40]!r}; the newest intact one is {name}")
            return step, folder / name
        passed.append(problem)
        warnings.warn(f"passing over the checkpoint of step {step}: {problem}")
    if passed or latest is not None:
        raise ValueError(f"no intact checkpoint is left in {folder} ({'; '.join(passed) or 'no metadata files'}); "
                         "restore one, or move the folder away to start from the beginning")
    return None


def resume(metadata: str | Path, into: dict[str, dict[str, torch.Tensor]], tp_dims: dict[str, int | None]) -> dict:
    """Fill `into` {"ema" | "master" | "exp_avg" | "exp_avg_sq": {our name: this rank's tensor}}; return save's meta.
    From any tp to any tp (tp_dims: our name -> dim or None). ValueError unless names and shapes fit exactly."""
    for group, tensors in into.items():
        targets = {to_nvidia(name): (tensor, tp_dims[name]) for name, tensor in tensors.items()}
        found = _open(Path(metadata), group, "model" if group == "ema" else "optim")
        _fill(targets, found, f"the {group} of {metadata} does not fit this run")
    return _map(Path(metadata))["extra"]


# ---- split and merge (SPEC 8) ----------------------------------------------------------------------------------------


def split(path: str | Path, size: int = 8, suffix: str = "pt"):
    """FILE (its regular weights) -> checkpoints_tp/{stem}_model_mp_{r} beside it, one at a time, metadata file last."""
    path, weights = Path(path), open_weights(path)
    if odd := [f"{n} {t.shape}" for n, t in weights.items() if size < 1 or t.dim is not None and t.shape[t.dim] % size]:
        raise ValueError(f"{path} cannot be split over tp {size}, which does not divide {_some(odd)}")
    folder = path.parent / "checkpoints_tp"
    folder.mkdir(exist_ok=True)
    for stale in [*folder.glob(f"{path.stem}.pt"), *folder.glob(f"{path.stem}_model_mp_*")]:
        stale.unlink()
    for rank in range(size):
        shard = {name: tensor.read(rank, size) for name, tensor in weights.items()}
        output = folder / f"{path.stem}_model_mp_{rank}.{suffix}"
        _write(output, {"model": shard, "ema": None} if suffix == "pt" else shard)
        del shard  # before the next one is read
    _write(folder / f"{path.stem}.pt", {"grad_scaler": {}, "iteration": 0})
    print(f"split {path} ({len(weights)} tensors) into {size} files in {folder}")


def merge(path: str | Path, output_directory: str | None = None, include_base_model: bool = False, suffix: str = "pt"):
    """Split files or a run's checkpoint -> {stem}_{reg,ema}_model, flat, in fsdp_checkpoints/ (ema if there is one).
    include_base_model adds `base_model.*` from the base that the run was trained on."""
    path, base = Path(path), {}
    if include_base_model:
        if (saved := _map(path).get("extra", {}).get("base")) is None:
            raise ValueError(f"{path} does not say which base it was trained on; merge without --include-base-model")
        check_base(saved, base_identity(saved["file"]))
        weights = open_weights(saved["file"])
        nested = {name: t for name, t in weights.items() if name.startswith("base_model.")}
        base = nested or {"base_model." + name: t for name, t in weights.items()}
    folder = Path(output_directory) if output_directory else path.parent.parent / "fsdp_checkpoints"
    for kind in ("reg", "ema") if _open(path, "ema") else ("reg",):
        weights = open_weights(path, ema=kind == "ema") | base
        folder.mkdir(parents=True, exist_ok=True)
        output = folder / f"{path.stem}_{kind}_model.{suffix}"
        _write(output, {name: tensor.read() for name, tensor in weights.items()})
        print(f"wrote {output}: {len(weights)} tensors, {output.stat().st_size:,} bytes")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="split and merge checkpoints, on the CPU")
    commands = parser.add_subparsers(dest="command", required=True)
    splitter = commands.add_parser("split", help="a single file to tensor-parallel files, in checkpoints_tp/ beside it")
    splitter.add_argument("--tp", type=int, default=8, dest="size")
    merger = commands.add_parser("merge", help="a run's checkpoint to single files, in fsdp_checkpoints/")
    merger.add_argument("--output-directory")
    merger.add_argument("--include-base-model", action="store_true", help="add base_model.* of the base trained on")
    for command, file in ((splitter, "FILE"), (merger, "ITER.pt")):
        command.add_argument("path", metavar=file)
        command.add_argument("--format", choices=("pt", "safetensors"), default="pt", dest="suffix")
    options = vars(parser.parse_args(arguments))
    try:
        {"split": split, "merge": merge}[options.pop("command")](**options)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"convert.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
