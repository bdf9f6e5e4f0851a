"""Names and files: NVIDIA's names, split, merge, save, resume.

CPU only; nothing in a file is ever executed.

    python convert.py split FILE [--tp 8] [--format pt|safetensors]
    python convert.py merge ITER.pt [--output-directory D] [--include-base-model]
"""

import argparse
import ctypes
import hashlib
import io
import itertools
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
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import safetensors.torch
import torch

import tp

# ---- names ---------------------------------------------------------------------------------------

SEQ = "net.pos_embedder.seq"  # a constant of the files, in no module of ours
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
        raise ValueError(f"{name} is no parameter of the model or of a released checkpoint")
    return table[name]


def from_nvidia(name: str) -> str:
    """NVIDIA's full name -> ours; `base_model.logvar.*` is the same `logvar`. ValueError if not."""
    return to_nvidia(name.replace("base_model.logvar.", "logvar."), THEIRS)


def tp_dim_of(name: str) -> int | None:
    """Dimension along which the tensor of this NVIDIA name is split; None: replicated."""
    if name.endswith(("to_q.0.weight", "to_k.0.weight", "to_v.0.weight", "layer1.weight")):
        return 0
    return 1 if name.endswith(("to_out.0.weight", "layer2.weight")) else None


# ---- reading -------------------------------------------------------------------------------------

class DiskTensor:
    """A tensor in a mapped file, or its pieces along `dim` (None: all same) in the ranks' files."""

    def __init__(self, pieces, dim):
        self.pieces, self.dim = pieces[:1] if dim is None else pieces, dim
        self.shape = tuple(
            sum(p.shape[i] for p in pieces) if i == dim else n
            for i, n in enumerate(pieces[0].shape))

    def read(self, rank: int = 0, size: int = 1) -> torch.Tensor:
        """Rank's slice along `dim` (all of it if replicated), in memory of its own."""
        if self.dim is None:
            mine = self.pieces[0].clone(memory_format=torch.contiguous_format)
        else:
            parts = math.lcm(size, len(self.pieces))
            chunks = [
                chunk for piece in self.pieces
                for chunk in piece.chunk(parts // len(self.pieces), self.dim)
            ]
            mine = torch.cat(chunks[rank * parts // size : (rank + 1) * parts // size], self.dim)
        for stored in (piece.untyped_storage() for piece in self.pieces):
            # Pages in use count as our memory. Nobody writes to these, so they come back from the
            # file when needed.
            skew = stored.data_ptr() % mmap.PAGESIZE
            start, length = ctypes.c_void_p(stored.data_ptr() -
                                            skew), ctypes.c_size_t(stored.nbytes() + skew)
            ctypes.CDLL(None).madvise(start, length, mmap.MADV_DONTNEED)
        return mine


def _map(path, verify=False):
    """Content of a .pt or .safetensors file, tensors mapped; weights are under "model" even in a
    flat file. ValueError if it is not there, damaged or not just data."""
    try:
        if path.suffix == ".safetensors":
            return {"model": safetensors.torch.load_file(path, backend="mmap")}
        if verify and zipfile.ZipFile(
                path).testzip():  # torch.load does not look at the archive's checksums
            raise ValueError("a checksum is wrong")
        with torch.serialization.safe_globals([io.BytesIO]):  # `_extra_state` may hold one
            content = dict(torch.load(path, map_location="cpu", mmap=True, weights_only=True))
    except Exception as error:  # parsing an altered file can fail in any way
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if isinstance(error, pickle.UnpicklingError):
            reason = ("refused: it holds more than tensors and plain containers, and opening it "
                      "could run code")
        raise ValueError(
            f"{path} is not a readable checkpoint ({reason}); copy or download it again") from error
    return {"model": content} if any(isinstance(t, torch.Tensor)
                                     for t in content.values()) else content


def _open(path, group):
    """One group ("model", "ema", "master", ...) of a file or all ranks' files, by NVIDIA's name."""
    contents = [_map(path)]
    if not isinstance(contents[0].get("model"), dict):  # a metadata file
        kind = "model" if group in ("model", "ema") else "optim"
        found = {
            file.stem: file
            for file in path.parent.iterdir() if file.suffix in (".pt", ".safetensors")
        }
        count = contents[0].get("tp_size") or sum(
            stem.startswith(f"{path.stem}_{kind}_mp_") for stem in found)
        stems = [f"{path.stem}_{kind}_mp_{rank}" for rank in range(count or 1)]
        if lacking := [stem for stem in stems if stem not in found]:
            raise FileNotFoundError(f"{path} needs {lacking[0]}.pt, which is not there")
        contents = [_map(found[stem]) for stem in stems]
    ranks = [{name.replace("-", "."): t for name, t in (content.get(group) or {}).items()
              if not name.endswith("_extra_state")} for content in contents]
    for name, tensor in ranks[0].items():
        if not isinstance(tensor, torch.Tensor) or any(rank.keys() != ranks[0].keys()
                                                       for rank in ranks):
            raise ValueError(
                f"{path} does not hold the same named tensors in all of its parts (see {name})")
    return {name: DiskTensor([rank[name] for rank in ranks], tp_dim_of(name)) for name in ranks[0]}


def open_weights(path: str | Path, ema: bool = False) -> dict[str, DiskTensor]:
    """Weights of a released file, or of split files or a run's checkpoint (give the metadata file).
    EMA weights come with the regular ones of what is never trained. ValueError or FileNotFoundError
    if that fails."""
    if "files" in _map(path := Path(path)) and (problem := damage(path, "_model_mp_")):
        raise ValueError(f"{path} is damaged: {problem}; use another checkpoint")
    weights = _open(path, "model")
    if ema:
        averaged = _open(path, "ema")
        if lost := [
                n for n in weights.keys() - averaged.keys()
                if not n.startswith((SEQ, "net.final_", "logvar."))
        ]:
            raise ValueError(
                f"the EMA weights of {path} lack {len(lost)} tensors ({min(lost)}); use the "
                "regular ones")
        weights.update(averaged)
    return weights


def _base(weights, prefix=""):
    """What begins with `prefix` in the base, below `base_model.` or else the whole file."""
    nested = {
        n.removeprefix("base_model."): t
        for n, t in weights.items() if n.startswith("base_model." + prefix)
    }
    return nested or {name: t for name, t in weights.items() if name.startswith(prefix)}


def _fill(targets, found, title):
    """Copy `found` into targets {NVIDIA's name: local tensor}: all of them, or ValueError."""
    full = {
        name: tuple(n * tp.size() if i == tp_dim_of(name) else n
                    for i, n in enumerate(tensor.shape))
        for name, tensor in targets.items()
    }
    problems = {
        "missing": full.keys() - found.keys(), "unexpected": found.keys() - full.keys(),
        "misshapen": [
            f"{name} {found[name].shape}, expected {full[name]}"
            for name in full.keys() & found.keys() if found[name].shape != full[name]
        ]
    }
    lists = [
        f"{what} {len(names)}: {', '.join(sorted(names)[:20])}" for what, names in problems.items()
        if names
    ]
    if lists:
        raise ValueError(
            f"{title}: {'; '.join(lists)}; give a file of the model that the config describes")
    for name, tensor in targets.items():
        if not tensor.is_meta:
            tensor.copy_(found[name].read(tp.rank(), tp.size()))


def load(module_part: torch.nn.Module, path: str | Path, what: str, ema: bool = False):
    """Fill model.base, .control or .logvar (`what`), base and logvar from below `base_model.` where
    the file has that. Each rank reads its slices, cast to the model's dtype; a model on meta is
    only checked.
    ValueError lists missing, unexpected and misshapen names."""
    weights, source = open_weights(path, ema), f"{path} ({'EMA' if ema else 'regular'} weights)"
    found = _base(weights, "logvar." if what == "logvar" else "net.")
    if what == "control":
        found = {name: t for name, t in weights.items() if name.startswith("net.")}
    targets = {to_nvidia(f"{what}.{name}").removeprefix("base_model."): tensor
               for name, tensor in module_part.state_dict().items()}
    if what != "logvar" and found.pop(SEQ, None) is None:
        targets[SEQ] = torch.empty(0)  # of no use to us, but every such file has one
    kind = "control" if any(".zero_blocks." in name for name in found) else "base"
    views = "multi-view" if "net.view_embeddings.weight" in found else "single-view"
    _fill(targets, found,
          f"{source} ({views} {kind} by its names) does not fit the {what} of this model")
    if tp.world_rank() == 0 and not next(module_part.parameters()).is_meta:
        count = sum(math.prod(tensor.shape) for tensor in found.values())
        print(f"loaded {what} from {source}: {len(found)} tensors, {count:,} parameters")


def base_identity(path: str | Path) -> dict:
    """{"file", "size" in bytes, "digest"} of a base checkpoint, the same however it is split or
    stored. The digest is of the names, shapes, dtypes, first and last elements of all tensors."""
    digest, size = hashlib.sha256(), 0
    for name, tensor in sorted(_base(open_weights(path)).items()):
        digest.update(f"{name} {tensor.shape} {tensor.pieces[0].dtype}".encode())
        for sample in (tensor.pieces[0].flatten()[:4], tensor.pieces[-1].flatten()[-4:]):
            digest.update(sample.view(torch.uint8).numpy().tobytes())
        size += sum(piece.nbytes for piece in tensor.pieces)
    return {"file": str(path), "size": size, "digest": digest.hexdigest()}


def check_base(saved: dict, now: dict):
    """ValueError unless both `base_identity` dicts are of the same weights."""
    was, found = (f"{base['file']} ({base['size']} bytes, digest {base['digest'][:12]})"
                  for base in (saved, now))
    if saved["digest"] != now["digest"]:
        raise ValueError(
            f"this run was trained on the base {was}, not on {found}; set checkpoint.base_path to "
            "the former or start another run")


# ---- a run's checkpoints -------------------------------------------------------------------------

KINDS = ("model", "optim")  # a rank's files: weights and EMA; masters and the optimizer's state
METADATA = f"iter_{9 * '[0-9]'}.pt"
RANK_TIMEOUT = 1800.0  # seconds that rank 0 waits for the files of the others


class Save(namedtuple("Save", "step stall future", defaults=[0.0, None])):
    """A save under way. `stall`: seconds that training waited for the copy to the host."""

    def wait(self):
        """Until the files are on disk. RuntimeError if that failed; earlier ones are untouched."""
        try:
            self.future and self.future.result()
        except (OSError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise RuntimeError(
                f"the checkpoint of step {self.step} could not be written ({reason}); earlier ones "
                "are intact: make room or repair the disk, then rerun the same command") from error


def save(run_dir: str | Path, step: int, state: dict, meta: dict, keep_last: int = 3,
         keep_every: int = 0, previous: Save | None = None) -> Save:
    """Copy the state to the host, write `run_dir/checkpoints/iter_*` in the background. Every rank
    calls it.

    state: {"model" (control and logvar with buffers), "ema", "master", the optimizer's own (of what
    is trained): {our name: this rank's tensor}}. meta: JSON values, with "config_digest" and
    "seq_length" (the largest position table's). previous: the save before. A step saved intact is
    not written again.
    """
    json.dumps(meta)  # TypeError here rather than a file that cannot be opened at resume
    if previous:
        if previous.future and not previous.future.done():
            warnings.warn(
                f"step {step}: the save of step {previous.step} is still running, waiting for it")
        previous.wait()
    metadata = Path(run_dir) / "checkpoints" / f"iter_{step:09d}.pt"
    if tp.world_rank() == 0:
        metadata.parent.mkdir(parents=True, exist_ok=True)
        if damage(metadata):  # or not there: what a failed attempt at this very step left goes
            for path in metadata.parent.glob(f"{metadata.stem}*"):
                path.unlink()
    tp.barrier()
    if tp.dp_rank() != 0 or metadata.exists():
        return Save(step)
    began = time.perf_counter()
    host = {
        group: {
            to_nvidia(name): tensor.detach().to("cpu", non_blocking=True,
                                                copy=True)  # pinned, for CUDA
            for name, tensor in tensors.items()
        }
        for group, tensors in state.items()
    }
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    stall = time.perf_counter() - began
    host["model"][SEQ] = torch.arange(meta["seq_length"], dtype=torch.float32)
    host["ema"] = {name.replace(".", "-"): tensor for name, tensor in host["ema"].items()}
    record = {
        "iteration": step, "tp_size": tp.size(), "config_digest": meta["config_digest"],
        "extra": meta
    }
    return Save(
        step, stall,
        ThreadPoolExecutor(1).submit(_write_checkpoint, metadata, host, tp.rank(), record,
                                     keep_last, keep_every))


def _write(path, content):
    """Tensors for .safetensors or anything for torch.save: temporary name, flush, rename."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        if path.suffix == ".safetensors":
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
    """This rank's files; on rank 0 then the metadata, once the files of all ranks are there: a file
    with its final name is complete. Ranks meet in the file system because a thread must not use the
    collectives of training."""
    weights = {group: host.pop(group) for group in ("model", "ema")}
    for kind, groups in zip(KINDS, (weights, host)):
        _write(metadata.with_name(f"{metadata.stem}_{kind}_mp_{rank}.pt"), groups)
    if rank == 0:
        paths = [
            metadata.with_name(f"{metadata.stem}_{k}_mp_{r}.pt") for r in range(record["tp_size"])
            for k in KINDS
        ]
        deadline = time.monotonic() + RANK_TIMEOUT
        while late := [path.name for path in paths if not path.exists()]:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"no {late[0]} after {RANK_TIMEOUT:.0f} s: that rank failed or has another disk"
                )
            time.sleep(0.05)
        _write(metadata, record | {"files": {path.name: _fingerprint(path) for path in paths}})
        metadata.with_name("latest_checkpoint.txt").write_text(metadata.name)
        _prune(metadata, keep_last, keep_every)


def _prune(newest, keep_last, keep_every):
    """Remove what is older than `newest`, failed saves too, but those that are to be kept."""
    complete = [path.stem for path in sorted(newest.parent.glob(METADATA)) if path <= newest]
    kept = complete[-keep_last:] + [
        stem for stem in complete if keep_every and int(stem[5:]) % keep_every == 0
    ]
    for path in sorted(
            newest.parent.glob("iter_*")):  # a metadata file before the files that it lists
        if path.name[:14] < newest.stem and path.name[:14] not in kept:
            path.unlink()


def damage(metadata: Path, kind: str = "") -> str | None:
    """What is wrong with a run's checkpoint (its files named with `kind`), in words, or None."""
    try:
        record = _map(metadata, verify=True)
        if "files" not in record or metadata.name != f"iter_{record['iteration']:09d}.pt":
            return f"{metadata.name} has been altered"
        for name, written in record["files"].items():
            if kind in name and (found := _fingerprint(metadata.with_name(name))) != written:
                return f"{name} is not what was written ({found}, not {written})"
    except (ValueError, OSError) as error:
        return str(error)
    return None


def find_resume(run_dir: str | Path) -> tuple[int, Path] | None:
    """(step, metadata path) of the newest complete and intact checkpoint, None before any.
    The directory decides, not latest_checkpoint.txt. Warns about what it passes over; ValueError if
    nothing is left."""
    folder, passed = Path(run_dir) / "checkpoints", []
    latest = folder / "latest_checkpoint.txt"
    said = latest.read_text(errors="replace").strip() if latest.is_file() else None
    for path in sorted(folder.glob(METADATA), reverse=True):
        if not (problem := damage(path)):
            if said != path.name:
                warnings.warn(
                    f"latest_checkpoint.txt says {said!r:.40}; the newest intact one is {path.name}"
                )
            return int(path.stem[5:]), path
        passed.append(problem)
        warnings.warn(f"passing over {path.name}: {problem}")
    if passed or said is not None:
        raise ValueError(
            f"no intact checkpoint is left in {folder} "
            f"({'; '.join(passed) or 'no metadata files'}); restore one, or move the "
            "folder away to start from the beginning")
    return None


def optimizer_state(metadata: str | Path) -> tuple[list[str], dict]:
    """The optimizer's groups in a run's checkpoint (exp_avg, ...), and save's meta, in which its
    single values are "optimizer"."""
    path, meta = Path(metadata), _map(Path(metadata))["extra"]
    if "optimizer" not in meta:  # of a run before other optimizers were saved
        meta["optimizer"] = {"optimizer": "AdamW", "step": float(meta["optimizer_steps"])}
    groups = _map(path.with_name(f"{path.stem}_optim_mp_0.pt"))
    return [group for group in groups if group != "master"], meta


def resume(metadata: str | Path, into: dict[str, dict[str, torch.Tensor]]) -> dict:
    """Fill `into` {"ema" | "master" | the optimizer's: {our name: this rank's tensor}}; return
    save's meta. From any tp to any tp. ValueError unless names and shapes fit exactly."""
    for group, tensors in into.items():
        targets = {to_nvidia(name): tensor for name, tensor in tensors.items()}
        _fill(targets, _open(Path(metadata), group),
              f"the {group} of {metadata} does not fit this run")
    return _map(Path(metadata))["extra"]


# ---- split and merge -----------------------------------------------------------------------------

def split(path: str | Path, size: int = 8, suffix: str = "pt"):
    """FILE (its regular weights) -> checkpoints_tp/{stem}_model_mp_{r} beside it, metadata last."""
    path, weights = Path(path), open_weights(path)
    if odd := [
            f"{n} {t.shape}" for n, t in weights.items()
            if size < 1 or t.dim is not None and t.shape[t.dim] % size
    ]:
        raise ValueError(f"{path} cannot be split over tp {size}, which does not divide {odd[0]}")
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


def merge(path: str | Path,
          output_directory: str | None = None,
          include_base_model: bool = False,
          suffix: str = "pt"):
    """Split files or a run's checkpoint -> {stem}_{reg,ema}_model, flat, in fsdp_checkpoints/ (ema
    if there is one). include_base_model adds `base_model.*` of the base that it was trained on."""
    path, base = Path(path), {}
    if include_base_model:
        if (saved := _map(path).get("extra", {}).get("base")) is None:
            raise ValueError(
                f"{path} does not say which base it was trained on; merge without "
                "--include-base-model")
        check_base(saved, base_identity(saved["file"]))
        base = {
            f"base_model.{name}": tensor
            for name, tensor in _base(open_weights(saved["file"])).items()
        }
    folder = Path(output_directory or path.parent.parent / "fsdp_checkpoints")
    for kind in ("reg", "ema") if _open(path, "ema") else ("reg",):
        weights = open_weights(path, ema=kind == "ema") | base
        folder.mkdir(parents=True, exist_ok=True)
        output = folder / f"{path.stem}_{kind}_model.{suffix}"
        _write(output, {name: tensor.read() for name, tensor in weights.items()})
        print(f"wrote {output}: {len(weights)} tensors, {output.stat().st_size:,} bytes")


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, or 2 for a mistake that a sentence on stderr explains."""
    parser = argparse.ArgumentParser(description="split and merge checkpoints, on the CPU")
    commands = parser.add_subparsers(dest="command", required=True)
    splitter = commands.add_parser(
        "split", help="a single file to tensor-parallel files, in checkpoints_tp/ beside it")
    splitter.add_argument("--tp", type=int, default=8, dest="size")
    merger = commands.add_parser("merge",
                                 help="a run's checkpoint to single files, in fsdp_checkpoints/")
    merger.add_argument("--output-directory")
    merger.add_argument("--include-base-model",
                        action="store_true",
                        help="add base_model.* of the base trained on")
    for command, file in ((splitter, "FILE"), (merger, "ITER.pt")):
        command.add_argument("path", metavar=file)
        command.add_argument("--format", choices=("pt", "safetensors"), default="pt", dest="suffix")
    options = vars(parser.parse_args(arguments))
    try:
        {"split": split, "merge": merge}[options.pop("command")](**options)
    except (ValueError, OSError, RuntimeError, safetensors.SafetensorError) as error:
        print(f"convert.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
