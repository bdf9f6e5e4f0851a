"""Names and files: NVIDIA's names, split, merge, save, resume. CPU only; nothing in a file is ever executed.

    python convert.py split FILE [--tp 8] [--format pt|safetensors]
    python convert.py merge RUN/checkpoints/iter_000000100.pt [--output-directory D] [--include-base-model]

Files are mapped, not read: a tensor is copied from the mapping slice by slice, and the pages are given back behind the
copy, so resident memory is what the caller asked for. SPEC sections 3 and 8.
"""

import argparse
import ctypes
import hashlib
import io
import json
import mmap
import os
import pickle
import re
import sys
import time
import warnings
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch

import tp

# ---- names -----------------------------------------------------------------------------------------------------------

ATTENTION = {"q": "to_q.0", "k": "to_k.0", "v": "to_v.0", "out": "to_out.0", "q_norm": "to_q.1", "k_norm": "to_k.1"}
BLOCK = {"mlp.up.weight": "blocks.2.block.layer1.weight", "mlp.down.weight": "blocks.2.block.layer2.weight"}
for j, sublayer in enumerate(("self_attn", "cross_attn", "mlp")):
    BLOCK[f"{sublayer}.ada.down.weight"] = f"blocks.{j}.adaLN_modulation.1.weight"
    BLOCK[f"{sublayer}.ada.up.weight"] = f"blocks.{j}.adaLN_modulation.2.weight"
    if sublayer != "mlp":
        BLOCK |= {f"{sublayer}.{a}.weight": f"blocks.{j}.block.attn.{n}.weight" for a, n in ATTENTION.items()}
DIT = {  # ours -> NVIDIA's, * is the index of a block
    "patch_embed.weight": "x_embedder.proj.1.weight",
    "time_mlp.0.weight": "t_embedder.1.linear_1.weight",
    "time_mlp.2.weight": "t_embedder.1.linear_2.weight",
    "emb_norm.weight": "affline_norm.weight",
    "pos_t": "extra_pos_embedder.pos_emb_t",
    "pos_h": "extra_pos_embedder.pos_emb_h",
    "pos_w": "extra_pos_embedder.pos_emb_w",
    "pos_embedder.seq": "pos_embedder.seq",  # a constant of the files, in no module of ours
    "view_embed.weight": "view_embeddings.weight",
    "frame_repeat.weight": "repeat_frame_embedding.weight",
    "frame_repeat.bias": "repeat_frame_embedding.bias",
    "head.linear.weight": "final_layer.linear.weight",
    "head.ada.down.weight": "final_layer.adaLN_modulation.1.weight",
    "head.ada.up.weight": "final_layer.adaLN_modulation.2.weight",
} | {f"blocks.*.{ours}": f"blocks.block*.{theirs}" for ours, theirs in BLOCK.items()}
HINT = {"hint_embed.weight": "x_embedder2.proj.1.weight"}
for part in ("weight", "bias"):
    HINT |= {f"hint_encoder.{i}.{part}": f"input_hint_block.{i}.{part}" for i in range(0, 16, 2)}
    HINT[f"zero_linears.*.{part}"] = f"zero_blocks.block*.{part}"
LOGVAR = {"freqs": "0.freqs", "phases": "0.phases", "weight": "1.weight"}
PARTS = (("control.", "net.", DIT | HINT), ("base.", "base_model.net.", DIT), ("logvar.", "logvar.", LOGVAR))
INDEX = re.compile(r"((?:blocks\.(?:block)?|zero_linears\.|zero_blocks\.block))(0|[1-9]\d*)\.")
SEQ = "pos_embedder.seq"
UNTRAINED = ("net." + SEQ, "net.final_layer.", "logvar.")  # control tensors that may have no average of their own


def _rename(name, parts):
    for source, target, table in parts:
        if name.startswith(source):
            stem, index = name[len(source):], INDEX.match(name, len(source))
            key = stem if index is None else f"{index[1]}*{name[index.end(2):]}"
            if key in table and "*" not in stem:
                return target + table[key].replace("*", index[2] if index else "*")
    raise ValueError(f"{name} is no parameter of the model or of a released checkpoint")


def to_nvidia(name: str) -> str:
    """Our full parameter name -> NVIDIA's (SPEC 3). ValueError for a name that is none of ours."""
    return _rename(name, PARTS)


def from_nvidia(name: str) -> str:
    """NVIDIA's full name -> ours; `base_model.logvar.*` is the same `logvar`. ValueError for an unknown name."""
    inverse = [(theirs, ours, {b: a for a, b in table.items()}) for ours, theirs, table in PARTS]
    return _rename(name.removeprefix("base_model.") if name.startswith("base_model.logvar.") else name, inverse)


def tp_dim_of(name: str) -> int | None:
    """Dimension along which the tensor of this NVIDIA name is split over tensor-parallel ranks; None if replicated."""
    if name.endswith(("to_q.0.weight", "to_k.0.weight", "to_v.0.weight", "layer1.weight")):
        return 0
    return 1 if name.endswith(("to_out.0.weight", "layer2.weight")) else None


# ---- tensors on disk -------------------------------------------------------------------------------------------------

BAND = 1 << 24  # bytes that are copied before their pages are given back
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
_libc = ctypes.CDLL(None)


def _release(mapped):
    # Only for tensors of a private file mapping that nobody writes to: dropped pages come back from the file.
    start = mapped.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    end = mapped.data_ptr() + mapped.stride(0) * mapped.shape[0] * mapped.element_size()
    _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


@dataclass(frozen=True)
class DiskTensor:
    """A tensor of one mapped file (one piece), or cut along `dim` over the files of several ranks (one piece each)."""

    pieces: tuple[torch.Tensor, ...]
    dim: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.pieces[0].shape)
        if len(self.pieces) > 1:
            shape[self.dim] = sum(piece.shape[self.dim] for piece in self.pieces)
        return tuple(shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.pieces[0].dtype

    @property
    def nbytes(self) -> int:
        return sum(piece.numel() * piece.element_size() for piece in self.pieces)

    def copy_to(self, out: torch.Tensor, rank: int = 0, size: int = 1):
        """Fill `out` (any device and dtype) with rank's slice along `dim`; all of it if replicated."""
        dim = self.dim or 0
        first = 0 if self.dim is None else rank * self.shape[dim] // size
        offset = 0
        for piece in map(torch.atleast_1d, self.pieces):
            target = torch.atleast_1d(out)
            start, end = max(first, offset), min(first + target.shape[dim], offset + piece.shape[dim])
            if start < end:
                source = piece.narrow(dim, start - offset, end - start)
                target = target.narrow(dim, start - first, end - start)
                rows = max(1, BAND // max(1, piece.stride(0) * piece.element_size()))
                for band, mapped in zip(target.split(rows), source.split(rows)):
                    band.copy_(mapped)
                    _release(mapped)
            offset += piece.shape[dim]

    def read(self, rank: int = 0, size: int = 1) -> torch.Tensor:
        """Rank's slice as a tensor of its own memory."""
        shape = list(self.shape)
        if self.dim is not None:
            shape[self.dim] //= size
        out = torch.empty(shape, dtype=self.dtype)
        self.copy_to(out, rank, size)
        return out


class Weights(dict):
    """NVIDIA's flat names -> DiskTensor. `source` says which file, and whether EMA or regular weights."""

    source: str


def _map_safetensors(path):
    data = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)
    start = 8 + int.from_bytes(data[:8].numpy().tobytes(), "little")
    header = json.loads(data[8:start].numpy().tobytes())
    header.pop("__metadata__", None)
    return {name: data[start:][slice(*entry["data_offsets"])].view(DTYPES[entry["dtype"]]).view(entry["shape"])
            for name, entry in header.items()}


def _map(path):
    """The content of a .pt or .safetensors file, tensors mapped. ValueError if it is damaged or not just data."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        if path.suffix == ".safetensors":
            return _map_safetensors(path)
        with torch.serialization.safe_globals([io.BytesIO]):  # `_extra_state` may hold one
            return dict(torch.load(path, map_location="cpu", mmap=True, weights_only=True))
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} was refused: it holds more than tensors and plain containers, and opening it could "
                         "run code; use a file of plain tensors, or .safetensors") from error
    except Exception as error:  # there is no end to the ways in which parsing an altered file can fail
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not a readable checkpoint ({reason}); copy or download it again") from error


def _rank_files(metadata, kind, size=None):
    """Files of all ranks beside `{stem}.pt`, in rank order."""
    found = {int(m[1]): path for path in metadata.parent.iterdir()
             if (m := re.fullmatch(re.escape(f"{metadata.stem}_{kind}_mp_") + r"(\d+)\.(pt|safetensors)", path.name))}
    for rank in range(size or max(found, default=0) + 1):
        if rank not in found:
            raise FileNotFoundError(f"{metadata} needs {metadata.stem}_{kind}_mp_{rank}.pt, which is not there")
    return [found[rank] for rank in range(size or len(found))]


def _join(contents, group, title):
    """One group ("model", "ema", "master", ...) of every rank's file -> {NVIDIA's name: DiskTensor}."""
    parts = [{name.replace("-", "."): t for name, t in content[group].items() if not name.endswith("_extra_state")}
             for content in contents]
    for name, tensor in parts[0].items():
        if not isinstance(tensor, torch.Tensor) or any(part.keys() != parts[0].keys() for part in parts):
            raise ValueError(f"{title} does not hold the same named tensors in all of its parts (see {name})")
    dims = {name: tp_dim_of(name) for name in parts[0]}
    return {name: DiskTensor(tuple(p[name] for p in parts[:1 if dims[name] is None else None]), dims[name])
            for name in parts[0]}


def _contents(path):
    """Content of a weights file, of every rank if it is split, as [{"model": ..., "ema": ...}], and the metadata."""
    content = _map(path)
    if isinstance(content.get("model"), dict):
        return [content], {}
    if any(isinstance(value, torch.Tensor) for value in content.values()):
        return [{"model": content, "ema": None}], {}
    if "files" in content and (problem := damage(path, kind="_model_mp_")):
        raise ValueError(f"{path} is damaged: {problem}; use another checkpoint")
    ranks = [_map(file) for file in _rank_files(path, "model", content.get("tp_size"))]
    return [rank if isinstance(rank.get("model"), dict) else {"model": rank, "ema": None} for rank in ranks], content


def open_weights(path: str | Path, ema: bool = False) -> Weights:
    """Weights of a released file, of a split one, or of a run's checkpoint (give its metadata file), any tp.

    EMA weights come with the regular ones of what is never trained. ValueError or FileNotFoundError say what is wrong.
    """
    contents, _ = _contents(Path(path))
    if ema and not contents[0].get("ema"):
        raise ValueError(f"{path} holds no EMA weights; ask for the regular ones")
    weights = Weights(_join(contents, "model", path))
    if ema:
        averaged = _join(contents, "ema", path)
        if lost := [n for n in weights if n not in averaged and not n.startswith(UNTRAINED)]:
            raise ValueError(f"the EMA weights of {path} lack {_some(lost)}; use the regular ones")
        weights.update(averaged)
    weights.source = f"{path} ({'EMA' if ema else 'regular'} weights)"
    return weights


# ---- into the model --------------------------------------------------------------------------------------------------


def _some(lines, limit=20):
    return ", ".join(lines[:limit]) + (f" and {len(lines) - limit} more" if len(lines) > limit else "")


def _fill(targets, found, title):
    """Copy `found` into targets {NVIDIA's name: (local tensor, tp_dim)}: all of them, or ValueError."""
    misshapen = []
    for name in targets.keys() & found.keys():
        tensor, dim = targets[name]
        expected = tuple(n * tp.size() if i == dim else n for i, n in enumerate(tensor.shape))
        if expected != found[name].shape:
            misshapen.append(f"{name} {found[name].shape}, expected {expected}")
    problems = {"missing": targets.keys() - found.keys(), "unexpected": found.keys() - targets.keys(),
                "misshapen": misshapen}
    if any(problems.values()):
        raise ValueError(f"{title}: " + "; ".join(f"{kind} {len(names)}: {_some(sorted(names))}"
                                                  for kind, names in problems.items() if names))
    for name, (tensor, dim) in targets.items():
        found[name].copy_to(tensor.detach(), *((0, 1) if dim is None else (tp.rank(), tp.size())))


def load(module_part: torch.nn.Module, weights: Weights, what: str):
    """Fill model.base, model.control or model.logvar (`what` is its name) with this rank's slices, cast to its dtype.

    The base and logvar come from below `base_model.` where the file has that, else from `net.` and `logvar.`.
    Strict (SPEC 3): ValueError with all missing, unexpected and misshapen names.
    """
    own = next(theirs for ours, theirs, _ in PARTS if ours == what + ".")
    plain = own.removeprefix("base_model.")
    nested = what != "control" and any(name.startswith("base_model." + plain) for name in weights)
    prefix = "base_model." + plain if nested else plain
    found = {name: tensor for name, tensor in weights.items() if name.startswith(prefix)}
    targets = {prefix + to_nvidia(f"{what}.{name}").removeprefix(own): (tensor, getattr(tensor, "tp_dim", None))
               for name, tensor in module_part.state_dict(keep_vars=True).items()}
    if what != "logvar" and found.pop(prefix + SEQ, None) is None:
        targets[prefix + SEQ] = (torch.empty(0), None)  # of no use to us, but every such file has one
    kind = "control" if any(".zero_blocks." in name for name in found) else "base"
    views = "multi-view" if any(name.endswith("view_embeddings.weight") for name in found) else "single-view"
    _fill(targets, found, f"{weights.source} ({views} {kind} by its names) does not fit the {what} of this model")
    if tp.world_rank() == 0:
        count = sum(torch.Size(tensor.shape).numel() for tensor in found.values())
        print(f"loaded {what} from {weights.source}: {len(found)} tensors, {count:,} parameters")


def copy_base_to_control(model: torch.nn.Module):
    """Start the control branch from the loaded base: every parameter but the hint's own and the zero linears."""
    base = dict(model.base.named_parameters())
    for name, parameter in model.control.named_parameters():
        if not name.startswith(("hint_embed.", "hint_encoder.", "zero_linears.")):
            if base[name].shape != parameter.shape:  # copy_ would broadcast
                raise ValueError(f"control.{name} {tuple(parameter.shape)} cannot start from {tuple(base[name].shape)}")
            parameter.detach().copy_(base[name].detach())


def base_identity(path: str | Path) -> dict:
    """{"file", "size", "digest"} of a base checkpoint, the same however it is split or stored.

    size in bytes of the tensors; digest of names, shapes, dtypes and the first and last elements of each tensor.
    """
    weights = open_weights(path)
    prefix = "base_model." if any(name.startswith("base_model.") for name in weights) else ""
    digest, size = hashlib.sha256(), 0
    for name in sorted(name for name in weights if name.startswith(prefix)):
        tensor = weights[name]
        digest.update(f"{name.removeprefix(prefix)} {tensor.shape} {tensor.dtype}".encode())
        for piece, row, part in ((tensor.pieces[0], 0, slice(4)), (tensor.pieces[-1], -1, slice(-4, None))):
            while piece.dim() > 1:
                piece = piece[row]
            digest.update(torch.atleast_1d(piece)[part].clone().view(torch.uint8).numpy().tobytes())
        size += tensor.nbytes
    return {"file": str(path), "size": size, "digest": digest.hexdigest()}


def check_base(saved: dict, now: dict):
    """ValueError unless both `base_identity` dicts are of the same weights."""
    if saved["digest"] != now["digest"]:
        raise ValueError(f"this run was trained on the base {saved['file']} ({saved['size']} bytes, digest "
                         f"{saved['digest'][:12]}), not on {now['file']} ({now['size']} bytes, digest "
                         f"{now['digest'][:12]}); set checkpoint.base_path to the former or start another run")


# ---- writing ---------------------------------------------------------------------------------------------------------


@contextmanager
def _atomic(path):
    """Yields a temporary path beside `path`; flushed to disk and renamed if the block succeeds, removed if it fails."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _flush(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_text(path, text):
    with _atomic(path) as temporary:
        temporary.write_text(text)


def _write_weights(path, tensors, wrap=False):
    """A flat dict of tensors to .pt (in `{"model": ..., "ema": None}` if wrap) or .safetensors, by the suffix."""
    with _atomic(path) as temporary:
        if path.suffix == ".pt":
            torch.save({"model": tensors, "ema": None} if wrap else tensors, temporary)
        else:
            safetensors.torch.save_file(tensors, temporary, metadata={"format": "pt"})


# ---- a run's checkpoints ---------------------------------------------------------------------------------------------

RANK_TIMEOUT = 1800.0  # seconds that rank 0 waits for the files of the others
OPTIM = ("master", "exp_avg", "exp_avg_sq")
METADATA = re.compile(r"iter_(\d{9,})\.pt")


@dataclass
class Save:
    """A save under way. `stall`: seconds that training waited for the host copy."""

    step: int
    stall: float = 0.0
    host: dict | None = None  # host copies, filled again by the next save
    future: Future | None = None

    def wait(self):
        """Until the files are on disk. RuntimeError if that failed; the checkpoint before is then untouched."""
        try:
            if self.future is not None:
                self.future.result()
        except (OSError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise RuntimeError(f"the checkpoint of step {self.step} could not be written ({reason}); earlier ones are "
                               "intact: make room or repair the disk, then rerun the same command") from error


def save(run_dir: str | Path, step: int, state: dict, meta: dict, keep_last: int = 3, keep_every: int = 0,
         previous: Save | None = None) -> Save:
    """Copy the state to the host, write `run_dir/checkpoints/iter_*` (SPEC 8) in the background. Every rank calls it.

    state: {"model": {our name: this rank's tensor}, control and logvar with its buffers; "ema": the same for what is
    trained; "optim": {our name: {"master", "exp_avg", "exp_avg_sq"}}}. meta: JSON values for `resume` to return, among
    them "config_digest" and "seq_length" (of the largest position table). previous: the save before, which is waited
    for; its host memory is used again. A step that is already saved intact is not written twice.
    """
    if keep_last < 1:
        raise ValueError(f"checkpoint.keep_last is {keep_last} and must be 1 or more")
    if lacking := {"config_digest", "seq_length"} - meta.keys():
        raise ValueError(f"meta has no {' and no '.join(sorted(lacking))}: give save all of them")
    if previous is not None and previous.future is not None:
        if not previous.future.done():
            warnings.warn(f"step {step}: the save of step {previous.step} is still running, waiting for it")
        previous.wait()
    metadata = Path(run_dir) / "checkpoints" / f"iter_{step:09d}.pt"
    if tp.world_rank() == 0:
        _clear(metadata)
    tp.barrier()
    if tp.dp_rank() != 0 or metadata.exists():
        return Save(step, host=previous and previous.host)
    began = time.perf_counter()
    host = _host_copy(_file_contents(state, meta["seq_length"]), (previous and previous.host) or {})
    stall = time.perf_counter() - began
    record = {"iteration": step, "tp_size": tp.size(), "config_digest": meta["config_digest"], "extra": meta}
    _seal(record)  # TypeError here for what is no plain value, rather than a file that cannot be opened at resume
    worker = ThreadPoolExecutor(1)
    future = worker.submit(_write_checkpoint, metadata, host, tp.rank(), record, keep_last, keep_every)
    worker.shutdown(wait=False)
    return Save(step, stall, host, future)


def _clear(metadata):
    """Remove what a failed attempt at this very step left, but an intact checkpoint stays."""
    metadata.parent.mkdir(parents=True, exist_ok=True)
    if metadata.exists() and damage(metadata):
        metadata.unlink()
    for path in metadata.parent.glob(f"{metadata.stem}*"):
        if path.suffix in (".done", ".tmp"):
            path.unlink()


def _file_contents(state, seq_length):
    """Training state -> content of a rank's files, under NVIDIA's names."""
    model = {to_nvidia(name): tensor for name, tensor in state["model"].items()}
    model["net." + SEQ] = torch.arange(seq_length, dtype=torch.float32)
    ema = {to_nvidia(name).replace(".", "-"): tensor for name, tensor in state["ema"].items()}
    optim = {kind: {to_nvidia(name): kinds[kind] for name, kinds in state["optim"].items()} for kind in OPTIM}
    return {"model": {"model": model, "ema": ema}, "optim": optim}


def _host_copy(tree, buffers):
    """The same tree in (pinned) host memory, every tensor with its own storage; reuses the buffers of the last save."""
    def copy(node, old):
        if isinstance(node, dict):
            return {key: copy(value, old.get(key) if old else None) for key, value in node.items()}
        if old is None or old.shape != node.shape or old.dtype != node.dtype:
            old = torch.empty(node.shape, dtype=node.dtype, pin_memory=node.is_cuda)
        return old.copy_(node.detach(), non_blocking=True)

    host = copy(tree, buffers)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return host


def _fingerprint(path):
    size, checksum = 0, 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return {"size": size, "checksum": checksum}


def _seal(record):
    return zlib.crc32(json.dumps({key: value for key, value in record.items() if key != "seal"}).encode())


def _write_checkpoint(metadata, host, rank, record, keep_last, keep_every):
    written = {}
    for kind, content in host.items():
        path = metadata.with_name(f"{metadata.stem}_{kind}_mp_{rank}.pt")
        with _atomic(path) as temporary:
            torch.save(content, temporary)
        written[path.name] = _fingerprint(path)
    _write_text(metadata.with_name(f"{metadata.stem}_rank_{rank}.done"), json.dumps(written))
    if rank == 0:
        done = [metadata.with_name(f"{metadata.stem}_rank_{r}.done") for r in range(record["tp_size"])]
        record["files"] = _collect(done)
        record["seal"] = _seal(record)
        with _atomic(metadata) as temporary:
            torch.save(record, temporary)
        _write_text(metadata.with_name("latest_checkpoint.txt"), metadata.name)
        for path in done:
            path.unlink()
        _prune(metadata, keep_last, keep_every)


def _collect(done):
    """Merge the ranks' lists of files. Ranks meet in the file system: a thread must not use training's collectives."""
    deadline = time.monotonic() + RANK_TIMEOUT
    while late := [path.name for path in done if not path.exists()]:
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {late[0]} after {RANK_TIMEOUT:.0f} s: that rank failed or writes to another disk")
        time.sleep(0.05)
    return {name: entry for path in done for name, entry in json.loads(path.read_text()).items()}


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
        record = _map(metadata)
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    if "seal" not in record or record["seal"] != _seal(record) or metadata.name != f"iter_{record['iteration']:09d}.pt":
        return f"{metadata.name} has been altered"
    for name, expected in record["files"].items():
        path = metadata.with_name(name)
        if kind in name and not path.exists():
            return f"{name} is missing"
        if kind in name and _fingerprint(path) != expected:
            return f"{name} ({path.stat().st_size} bytes) is not what was written ({expected['size']} bytes)"
    return None


def find_resume(run_dir: str | Path) -> tuple[int, Path] | None:
    """(step, metadata path) of the newest complete and intact checkpoint, None before the first one.

    The directory decides, not latest_checkpoint.txt. Warns about what it passes over; ValueError if nothing is left.
    """
    folder, passed = Path(run_dir) / "checkpoints", []
    names = os.listdir(folder) if folder.is_dir() else []
    for step, name in sorted(((int(m[1]), m[0]) for m in map(METADATA.fullmatch, names) if m), reverse=True):
        if problem := damage(folder / name):
            passed.append(problem)
            warnings.warn(f"passing over the checkpoint of step {step}: {problem}")
            continue
        latest = (folder / "latest_checkpoint.txt").read_bytes() if "latest_checkpoint.txt" in names else b""
        if latest.strip() != name.encode():
            warnings.warn(f"latest_checkpoint.txt says {latest[:40]!r}; the newest intact checkpoint is {name}")
        return step, folder / name
    if passed or "latest_checkpoint.txt" in names:
        raise ValueError(f"no intact checkpoint is left in {folder} ({'; '.join(passed) or 'no metadata files'}); "
                         "restore one, or move the folder away to start from the beginning")
    return None


def resume(metadata: str | Path, into: dict[str, dict[str, torch.Tensor]], tp_dims: dict[str, int | None]) -> dict:
    """Fill `into` {"ema" | "master" | "exp_avg" | "exp_avg_sq": {our name: this rank's tensor}}; return save's meta.

    From any tp to any tp; tp_dims: our name -> dim or None. The checkpoint is one that `find_resume` found intact.
    ValueError if names or shapes are not exactly those of the checkpoint.
    """
    record = _map(metadata := Path(metadata))
    for kind in ("model", "optim"):
        contents = [_map(file) for file in _rank_files(metadata, kind, record["tp_size"])]
        for group in into.keys() & contents[0].keys():
            targets = {to_nvidia(name): (tensor, tp_dims[name]) for name, tensor in into[group].items()}
            found = _join(contents, group, metadata)
            found.pop("net." + SEQ, None)
            _fill(targets, found, f"the {group} of {metadata} does not fit this run")
    return record["extra"]


# ---- split and merge -------------------------------------------------------------------------------------------------


def split(path: str | Path, size: int = 8, suffix: str = "pt"):
    """FILE (its regular weights) -> checkpoints_tp/{stem}_model_mp_{r} beside it, one at a time, metadata file last."""
    path, weights = Path(path), open_weights(path)
    if size < 1:
        raise ValueError(f"--tp is {size} and must be 1 or more")
    odd = [f"{name} {t.shape}" for name, t in weights.items() if t.dim is not None and t.shape[t.dim] % size]
    if odd:
        raise ValueError(f"{path} cannot be split over tp {size}, which does not divide {_some(odd)}")
    folder = path.parent / "checkpoints_tp"
    folder.mkdir(exist_ok=True)
    for stale in [folder / f"{path.stem}.pt", *folder.glob(f"{path.stem}_model_mp_*")]:
        stale.unlink(missing_ok=True)
    for rank in range(size):
        shard = {name: tensor.read(rank, size) for name, tensor in weights.items()}
        _write_weights(folder / f"{path.stem}_model_mp_{rank}.{suffix}", shard, wrap=True)
        del shard  # before the next one is read
    with _atomic(folder / f"{path.stem}.pt") as temporary:
        torch.save({"grad_scaler": {}, "iteration": 0}, temporary)
    print(f"split {path} ({len(weights)} tensors) into {size} files in {folder}")


def _base_tensors(metadata, record):
    """`base_model.*` from the base that the run was trained on."""
    if "base" not in record.get("extra", {}):
        raise ValueError(f"{metadata} does not say which base it was trained on; merge without --include-base-model")
    saved = record["extra"]["base"]
    weights = open_weights(saved["file"])
    check_base(saved, base_identity(saved["file"]))
    inside = {name: t for name, t in weights.items() if name.startswith("base_model.")}
    return inside or {"base_model." + name: t for name, t in weights.items()}


def merge(metadata: str | Path, output_directory: str | Path | None = None, include_base_model: bool = False,
          suffix: str = "pt"):
    """Split files or a run's checkpoint -> {stem}_reg_model and {stem}_ema_model, flat dicts, in fsdp_checkpoints/."""
    metadata = Path(metadata)
    contents, record = _contents(metadata)
    folder = Path(output_directory) if output_directory else metadata.parent.parent / "fsdp_checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    base = _base_tensors(metadata, record) if include_base_model else {}
    for kind in ("reg", "ema") if contents[0].get("ema") else ("reg",):
        weights = open_weights(metadata, ema=kind == "ema") | base
        path = folder / f"{metadata.stem}_{kind}_model.{suffix}"
        _write_weights(path, {name: tensor.read() for name, tensor in weights.items()})
        print(f"wrote {path}: {len(weights)} tensors, {path.stat().st_size:,} bytes")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="split and merge checkpoints, on the CPU")
    commands = parser.add_subparsers(dest="command", required=True)
    splitter = commands.add_parser("split", help="a single file to tensor-parallel files, in checkpoints_tp/ beside it")
    splitter.add_argument("file")
    splitter.add_argument("--tp", type=int, default=8)
    merger = commands.add_parser("merge", help="a run's checkpoint to single files, in fsdp_checkpoints/")
    merger.add_argument("metadata", help=".../checkpoints/iter_000000100.pt")
    merger.add_argument("--output-directory")
    merger.add_argument("--include-base-model", action="store_true", help="add base_model.* of the base trained on")
    for command in (splitter, merger):
        command.add_argument("--format", choices=("pt", "safetensors"), default="pt")
    options = parser.parse_args(arguments)
    try:
        if options.command == "split":
            split(options.file, options.tp, options.format)
        else:
            merge(options.metadata, options.output_directory, options.include_base_model, options.format)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"convert.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
