"""What a file is and holds: named tensors, whatever program wrote them; one of NVIDIA's releases by
its MD5; weights by their SHA-256; or something else that was taken for one of these. Nothing in a
file is ever executed. Files are read through a mapping, and written whole or not at all.

Used by tokenizer.py and by convert.py, whose command `verify` is here.
"""

import contextlib
import ctypes
import hashlib
import io
import json
import math
import mmap
import os
import pickle
import re
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import safetensors.torch
import torch
from tqdm import tqdm

SINGLE, MULTI = "Cosmos-Transfer1-7B-Sample-AV", "Cosmos-Transfer1-7B-Sample-AV-Single2MultiView"
TOKENIZER = "Cosmos-Tokenize1-CV8x8x8-720p"
RELEASED = {  # MD5, as Cosmos-Transfer1's download script lists it: (repository of nvidia, file)
    "2006e158f8a17a3b801c661f0c01e9f2": (SINGLE, "base_model.pt"),
    "184beee5414bcb6c0c5c0f09d8f8b481": (SINGLE, "lidar_control.pt"),
    "2ddd781560d221418c2ed9258b6ca829": (SINGLE, "hdmap_control.pt"),
    "a3fb13e8418d8bb366b58e4092bd91df": (MULTI, "t2w_base_model.pt"),
    "a9592d232a7e5f7971f39918c18eaae0": (MULTI, "t2w_lidar_control.pt"),
    "4f8a4340d48ebedaa9e7bab772e0203d": (MULTI, "t2w_hdmap_control.pt"),
    "48b2080ca5be66c05fac44dea4989a04": (MULTI, "v2w_base_model.pt"),
    "cb27af88ec7fb425faec32f4734d99cf": (MULTI, "v2w_lidar_control.pt"),
    "89b82db1bc1dc859178154f88b6ca0f2": (MULTI, "v2w_hdmap_control.pt"),
    "f5834d03645c379bc0f8ad14b9bc0299": (TOKENIZER, "encoder.jit"),
    "ff21a63ed817ffdbe4b6841111ec79a8": (TOKENIZER, "decoder.jit"),
}

# ---- files that are something else ---------------------------------------------------------------

OLD_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the number that old files begin with
SHARDS = ("holds shards of a distributed run (DTensor or ShardedTensor), not whole tensors; gather "
          "them in the program that made it (get_model_state_dict with full_state_dict=True)")
FOLDER = ("is a checkpoint of torch.distributed.checkpoint; make one file of its folder: python -m "
          "torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE.pt")


def fetch(path) -> str:
    """What to do for a whole copy of a file; the command, if its folder is named as released."""
    folder = Path(path).absolute().parent
    if folder.name not in (SINGLE, MULTI, TOKENIZER):
        return "download or copy it again"
    return (f"download it again: hf download nvidia/{folder.name} {Path(path).name} "
            f"--local-dir {folder}")


def misfit(path: Path, what: str = "checkpoint") -> str | None:
    """What a file is that cannot be a checkpoint, and what to do; None if it may be one.

    what: or "tokenizer", whose files may also be TorchScript archives or of an old torch.
    """
    if path.suffix == ".distcp" or path.is_dir() and any(path.glob("*.distcp")):
        return FOLDER
    if path.is_dir():
        inside = sorted(file.name for file in path.iterdir())
        return f"is a folder; name a file in it ({', '.join(inside[:5]) or 'it is empty'})"
    if path.exists() and not path.is_file():
        return "is no regular file (a pipe or a device); give a file on a disk"
    try:
        with open(path, "rb") as file:
            start = file.read(512)
    except PermissionError:
        return "may not be read by this user; change its permissions"
    if not start.strip(b"\0"):
        return f"{'holds only zeros at its start' if start else 'is empty'}; {fetch(path)}"
    if start.startswith(b"version https://git-lfs"):
        return f"is a Git LFS pointer, not the file itself; run git lfs pull, or {fetch(path)}"
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return ("is a web page, not the file itself; accept the license on that page, log in with "
                f"hf auth login, then {fetch(path)}")
    if start.startswith(b"PK\3\4"):
        return _misfit_zip(path, what)
    if start.startswith(OLD_TORCH):
        if what == "tokenizer":
            return None
        new = path.with_name(f"{path.stem}_zip.pt")
        return ("is in torch.save's format of before 1.6, which cannot be mapped; convert it once: "
                f"python -c \"import torch; torch.save(torch.load('{path}', weights_only=True), "
                f"'{new}')\"")
    if start[8:9] == b"{":
        return _misfit_safetensors(path)
    if start.startswith(b"\x80"):
        return "is a pickle that torch.save did not write; save a state_dict with torch.save"
    if start.isascii() and start.decode().replace("\n", " ").isprintable():
        return f"is a text file that begins with {start[:40].decode()!r}; give the {what} itself"
    return (f"is neither .pt nor .safetensors (it begins with the bytes {start[:8].hex(' ')}); "
            "unpack it if it is an archive, or give another file")


def _misfit_zip(path, what):
    try:  # is_zipfile raises, too, where an altered file says that it goes on on another disk
        if not zipfile.is_zipfile(path):
            size = path.stat().st_size
            return f"is cut short: its {size:,} bytes lack the archive's end; {fetch(path)}"
        with zipfile.ZipFile(path) as archive:
            records = {name.rpartition("/")[2] for name in archive.namelist()}
    except Exception as error:  # parsing an altered archive can fail in any way
        return f"is damaged ({words(error)}); {fetch(path)}"
    if "constants.pkl" in records and what == "checkpoint":
        return "is a TorchScript archive, such as the tokenizer's; give a checkpoint"
    return None if "data.pkl" in records else f"is a zip archive, not a {what}; unpack it"


def _misfit_safetensors(path):
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(min(length, size)))
            ends = [t["data_offsets"][1] for t in header.values() if "data_offsets" in t]
            whole = 8 + length + max(ends, default=0)
        except (ValueError, TypeError, AttributeError, LookupError):
            whole = 8 + length
    if size < whole:
        return f"is cut short: it has {size:,} of {whole:,} bytes; {fetch(path)}"
    return None


def words(error: Exception) -> str:
    """The first line of an error; of one whose text may be a mere key or type, its kind as well."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    line = text.splitlines()[0][:300] if text else ""
    if line and not isinstance(error, (LookupError, TypeError, AttributeError)):
        return line
    return f"its parts do not fit together: {type(error).__name__} {line}".strip()


def reason(error: Exception, path, what: str) -> str:
    """What an error of torch.load or safetensors says of a file, and what to do."""
    if re.search("DTensor|ShardedTensor|DeviceMesh|torch.distributed", str(error)):
        return SHARDS
    if isinstance(error, pickle.UnpicklingError):
        found = re.search(r"GLOBAL (\S+)", str(error))
        found = found[1] if found else "a pickle"
        return (f"holds more than tensors and plain containers ({found}), and opening it could run "
                "code; save the state_dict alone where it was made")
    return f"is not a readable {what} ({words(error)}); {fetch(path)}"


# ---- what a file holds ---------------------------------------------------------------------------

def check_whole(weights, path):
    """The weights; ValueError if they are one rank's part, or parts of which the last are missing.

    The model's query projections are square. Only a run's checkpoint says how many parts it has.
    """
    for name, tensor in weights.items() if "tp_size" not in read_file(path) else ():
        if name.endswith("to_q.0.weight") and len({*tensor.shape}) > 1:
            raise ValueError(f"{path} holds a part of the model ({name} is {tuple(tensor.shape)}, "
                             "and the whole of it square); give the file without _model_mp_ in its "
                             "name, with those of all ranks beside it")
    return weights


def read_file(path: Path, what: str = "checkpoint") -> dict:
    """Content of a .pt or .safetensors file, tensors mapped; a .pt may be safetensors all the same.

    what: or "tokenizer", whose files are small and checked for damage, too; its .jit gives the
    tensors of the archive, the pair in mean_std.pt "mean" and "std". ValueError if the file is none
    of these, damaged or not just data.
    """
    if problem := misfit(path, what):
        raise ValueError(f"{path} {problem}")
    zipped = zipfile.is_zipfile(path)
    if zipped and path.suffix == ".safetensors":  # torch.load goes by the name
        raise ValueError(f"{path} is a file of torch.save; name it {path.stem}.pt")
    old = what == "tokenizer" and path.suffix == ".pt"  # or may be: misfit admits no other here
    if zipped and what == "tokenizer":
        check_records(path)
    try:
        if path.suffix == ".jit":
            return read_archive(path)
        if not zipped and not old:
            return safetensors.torch.load_file(path, backend="mmap")
        # `_extra_state` may hold an io.BytesIO, and an empty one a call of bytes().
        allowed = [io.BytesIO, (lambda: b"", "builtins.bytes")]
        with torch.serialization.safe_globals(allowed):
            content = torch.load(path, map_location="cpu", mmap=zipped, weights_only=True)
    except Exception as error:  # as above
        raise ValueError(f"{path} {reason(error, path, what)}") from error
    if what == "tokenizer" and isinstance(content, (list, tuple)) and len(content) == 2:
        content = dict(zip(("mean", "std"), content))
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not tensors by name")
    return content


WRAPPERS = ("model", "state_dict", "model_state_dict", "module")  # {"state_dict": {name: tensor}}
INSERTED = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # in names


def _holds_tensors(content):
    return any(isinstance(value, torch.Tensor) for value in content.values())


def is_metadata(content: dict) -> bool:
    """Whether this is the small file beside the files of tensor-parallel ranks."""
    wrapped = any(isinstance(content.get(key), dict) for key in WRAPPERS)
    return type(content.get("iteration")) is int and not wrapped and not _holds_tensors(content)


def named_tensors(content: dict, group: str, path: Path) -> tuple[dict[str, torch.Tensor], int]:
    """({name: tensor} of a group, "model" or another, how many other things stand among them), out
    of wrappers, EMA names with their dots, without what torch.compile and others put into names."""
    if group != "model":
        content = content.get(group)
    for _ in WRAPPERS:  # as deep as they are ever nested
        inner = [content[key] for key in WRAPPERS if isinstance(content, dict)
                 and isinstance(content.get(key), dict) and not _holds_tensors(content)]
        content = inner[0] if inner else content
    tensors, other = {}, 0
    for name, value in content.items() if isinstance(content, dict) else ():
        if not isinstance(value, torch.Tensor) or str(name).endswith("_extra_state"):
            other += 1
            continue
        if type(value) not in (torch.Tensor, torch.nn.Parameter):
            raise ValueError(f"{path} {SHARDS}")
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise ValueError(f"{path} holds {name} sparse, quantized or empty; save it as it was")
        parts = str(name).replace("-", ".").split(".")
        name = ".".join(part for part in parts if part not in INSERTED)
        if name in tensors:
            raise ValueError(f"{path} holds {name} twice, in and out of a wrapper; remove one")
        tensors[name] = value.detach()
    if group == "model" and not tensors:
        listed = ", ".join(map(str, content))[:80] or "an empty dict"
        raise ValueError(f"{path} holds no tensors, only {listed}")
    return tensors, other


def tokenizer_files(path) -> list[Path]:
    """The files of a tokenizer's folder, or the one file; the .cache of a download is none."""
    found = sorted(file for file in Path(path).glob("[!.]*") if file.is_file())
    return found or [Path(path)]


class DiskTensor:
    """A tensor in a mapped file, or its pieces along `dim` (None: all same) in the ranks' files.

    mappings: the address ranges of this process that are files.
    """

    def __init__(self, pieces, dim, mappings=()):
        self.pieces, self.dim, self.mappings = pieces[:1] if dim is None else pieces, dim, mappings
        self.dtype, shape = pieces[0].dtype, list(pieces[0].shape)
        if dim is not None:
            shape[dim] = sum(piece.shape[dim] for piece in pieces)
        self.shape = torch.Size(shape)

    def read(self, rank: int = 0, size: int = 1) -> torch.Tensor:
        """Rank's slice along `dim` (all of it if replicated), in memory of its own."""
        if self.dim is None:
            mine = self.pieces[0].clone(memory_format=torch.contiguous_format)
        else:
            parts = math.lcm(size, len(self.pieces))
            chunks = [chunk for piece in self.pieces
                      for chunk in piece.chunk(parts // len(self.pieces), self.dim)]
            mine = torch.cat(chunks[rank * parts // size : (rank + 1) * parts // size], self.dim)
        for piece in self.pieces:
            self._release(piece.untyped_storage())
        return mine

    def _release(self, stored):
        """Pages of a file count as our memory once read: give them back, they return when needed.

        Other memory would come back as zeros, so that what is no mapping of a file is left alone.
        """
        skew = stored.data_ptr() % mmap.PAGESIZE
        start, length = stored.data_ptr() - skew, stored.nbytes() + skew
        if any(low <= start and start + length <= high for low, high in self.mappings):
            libc = ctypes.CDLL(None)
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


def file_mappings():
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:  # not Linux: nothing will be released
        return ()
    fields = [line.split(maxsplit=5) for line in lines]  # range, mode, offset, device, inode, file
    return [tuple(int(end, 16) for end in f[0].split("-")) for f in fields if f[4] != "0"]


# ---- TorchScript archives ------------------------------------------------------------------------

DTYPES = {"FloatStorage": torch.float32, "DoubleStorage": torch.float64,
          "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
          "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16,
          "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool}


class Attributes:
    """Stands for every class of an archive: what it holds, nothing of what it does."""
    held = {}

    def __setstate__(self, state):
        self.held = state if isinstance(state, dict) else {}


class ArchiveUnpickler(pickle._Unpickler):  # the one in Python: no index in a file exhausts memory
    """Reads data.pkl of an archive. No name in it is imported, so that nothing runs."""

    def __init__(self, archive):
        self.archive = archive
        self.root = next(iter(archive.namelist()), "archive").split("/")[0]
        super().__init__(io.BytesIO(archive.read(f"{self.root}/data.pkl")))

    def find_class(self, module, name):
        if module.split(".")[0] == "__torch__":
            return Attributes
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if module == "torch.jit._pickle":  # typed lists and dicts
            return lambda value, *rest: value
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self.tensor
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        raise ValueError(f"refused, {module}.{name} is code that could do anything")

    def persistent_load(self, identity):
        _, dtype, name, _, count = identity
        content = bytearray(self.archive.read(f"{self.root}/data/{name}"))
        return torch.frombuffer(content + bytes(dtype.itemsize), dtype=dtype)[:count]

    @staticmethod
    def tensor(storage, offset, size, stride, *rest):
        if math.prod(size) > len(storage):
            raise ValueError(f"a tensor of {size} has a storage of {len(storage)}")
        return storage.as_strided(size, stride, offset)


def read_archive(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of an archive by name: those in the attributes of its modules, so that
    {"encoder": {"conv_in": {"0": ...}}} gives "encoder.conv_in.0.conv3d.weight"."""
    with zipfile.ZipFile(path) as archive:
        try:
            modules, tensors = [("", ArchiveUnpickler(archive).load())], {}
        except pickle.UnpicklingError as error:
            raise ValueError(words(error)) from error  # else taken for one of torch.load
    for path, module in modules:  # a list that grows meanwhile
        for name, value in module.held.items():
            if torch.is_tensor(value):
                tensors[path + name] = value
            elif isinstance(value, Attributes):
                modules.append((f"{path}{name}.", value))
        if len(modules) > 10_000 or len(path) > 500:
            raise ValueError("its modules have no end")
    return tensors


# ---- writing, and knowing again what was written -------------------------------------------------

class _Stream:
    """The file under torch.save: keeps what it needs to be known again, and the disk's error, in
    whose place torch.save raises one that does not say why."""

    def __init__(self, file):
        self.file, self.size, self.checksum, self.error = file, 0, 0, None
        self.flush = file.flush

    def write(self, data):
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.size, self.checksum = self.size + len(data), zlib.crc32(data, self.checksum)
        return len(data)


def write(path, content):
    """Tensors for .safetensors or anything for torch.save: temporary name, flush, rename.

    Returns {"size", "checksum"} of what torch.save wrote.
    """
    temporary, stream = path.with_name(path.name + ".tmp"), None
    try:
        if path.suffix == ".safetensors":
            temporary.touch()
            mode = temporary.stat().st_mode  # as the umask has it; save_file's is for one user
            safetensors.torch.save_file(content, temporary, metadata={"format": "pt"})
            temporary.chmod(mode)
        with open(temporary, "ab" if path.suffix == ".safetensors" else "wb") as file:
            stream = _Stream(file)
            if path.suffix != ".safetensors":
                torch.save(content, stream)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)  # the new name has to reach the disk, too
        os.fsync(folder)
        os.close(folder)
    except RuntimeError as error:
        raise (stream.error if stream and stream.error else error) from None
    finally:
        temporary.unlink(missing_ok=True)
    return {"size": stream.size, "checksum": stream.checksum}


def write_entry(path: Path, tensors: dict, identity: str):
    """One small .safetensors of a cache, whole or not at all; OSError that names it."""
    partial = path.with_suffix(f".{os.getpid()}.partial")  # cut short, it is no entry
    try:
        partial.write_bytes(safetensors.torch.save(tensors, {"identity": identity}))
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise OSError(f"{path} could not be written ({error.strerror}); make room or give another "
                      "data.cache, and rerun: what is encoded stays") from None


def fingerprint(path: Path) -> dict:
    """What `write` has returned of a file, read off the disk."""
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return {"size": path.stat().st_size, "checksum": checksum}


def fingerprints(paths: list[Path]) -> list[dict]:
    """The same of several files, read side by side."""
    try:
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(fingerprint, paths))
    except RuntimeError:  # when the main thread has ended, Python starts no more threads
        return list(map(fingerprint, paths))


# ---- weights by all their bytes ------------------------------------------------------------------

def identify(files: list[Path], weights: dict, memory: Path | None) -> dict:
    """{"file", "size" in bytes, "sha256"} of weights, the same however they are split or stored.

    files: where they are, the one that was named first; weights: {name: what has read(), shape and
    dtype}. All bytes are read once: ValueError for a wrong checksum and for values that are not
    finite. memory: a JSON file that keeps the result while the files' sizes, times and inodes stay.
    """
    known, key = {}, f"{files[0].absolute()}: {len(weights)} tensors"
    stats = [file.stat() for file in files]
    stamp = [[stat.st_size, stat.st_mtime_ns, stat.st_ino] for stat in stats]
    if memory and memory.is_file():
        try:
            known = json.loads(memory.read_text())
        except ValueError:  # cut short as it was written
            pass
        if known.get(key, {}).get("stamp") == stamp:
            return known[key]["identity"]
    threads, names = min(16, os.cpu_count()), sorted(weights)
    for file in filter(zipfile.is_zipfile, files):
        check_records(file, threads)
    with ThreadPoolExecutor(threads) as pool:
        digests = list(pool.map(_digest, names, [weights[name] for name in names]))
    if odd := [name for name, digest in zip(names, digests) if digest is None]:
        raise ValueError(f"{files[0]} holds values that are not finite, in {len(odd)} tensors "
                         f"({', '.join(odd[:5])}); {fetch(files[0])}")
    size = sum(tensor.shape.numel() * tensor.dtype.itemsize for tensor in weights.values())
    identity = {"file": str(files[0]), "size": size,
                "sha256": hashlib.sha256("".join(digests).encode()).hexdigest()}
    if memory:
        known[key] = {"stamp": stamp, "identity": identity}
        with contextlib.suppress(OSError):  # a start without it reads the bytes again
            memory.parent.mkdir(parents=True, exist_ok=True)
            memory.write_text(json.dumps(known, indent=1))
    return identity


def _digest(name, tensor):
    """SHA-256 of a tensor's name, shape, dtype and bytes; None if a value is not finite."""
    values = tensor.read()
    wide = values if values.dtype.itemsize > 1 else values.float()  # of float8
    if wide.numel() and not torch.stack(torch.aminmax(wide)).isfinite().all():  # NaN counts as both
        return None
    digest = hashlib.sha256(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
    digest.update(values.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def check_records(path, threads=1):
    """ValueError for a wrong checksum in a .pt file; torch.load does not look at them."""
    def read(first):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist()[first::threads]:
                with archive.open(name) as record:
                    while record.read(1 << 22):
                        pass
    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(read, range(threads)))
    except Exception as error:  # as above
        raise ValueError(f"{path} was damaged after it was written ({words(error)}); "
                         f"{fetch(path)}") from error


# ---- verify --------------------------------------------------------------------------------------

def expected(cfg) -> list[tuple[str, Path, str, str]]:
    """[(config key, path, repository, released name)] of each file that a config names."""
    size, paths = cfg.model, []
    repository, prefix = (MULTI, f"{size.conditioning}_") if cfg.data.views > 1 else (SINGLE, "")
    if cfg.checkpoint.base_path != "random":
        paths.append(("checkpoint.base_path", Path(cfg.checkpoint.base_path), repository,
                      f"{prefix}base_model.pt"))
    if cfg.checkpoint.load_path:
        paths.append(("checkpoint.load_path", Path(cfg.checkpoint.load_path), repository,
                      f"{prefix}{cfg.data.hint}_control.pt"))
    folder = Path(cfg.tokenizer.path)
    if folder.is_file():
        paths.append(("tokenizer.path", folder, TOKENIZER, "encoder.jit"))
    elif cfg.data.root != "random":
        paths += [("tokenizer.path", folder / name, TOKENIZER, name)
                  for name in ("encoder.jit", "decoder.jit", "mean_std.pt")]
    return paths


def md5(path: Path) -> str:
    """MD5 of a file, with a progress bar."""
    digest = hashlib.md5()
    with open(path, "rb") as file, tqdm(total=path.stat().st_size, unit="B", unit_scale=True,
                                        desc=path.name, leave=False, disable=None) as bar:
        while block := file.read(1 << 22):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def verdict(path: Path, repository: str, name: str) -> tuple[bool, str]:
    """Whether a file is the release that it should be, and a sentence on what it is."""
    if not path.exists():
        return False, (f"missing; hf download nvidia/{repository} {name} --local-dir "
                       f"checkpoints/nvidia/{repository}")
    if problem := misfit(path, "tokenizer" if repository == TOKENIZER else "checkpoint"):
        return False, problem
    if name == "mean_std.pt":
        return True, "there; NVIDIA lists no MD5 of it"
    found = md5(path)
    if found not in RELEASED:
        size = path.stat().st_size
        return False, f"another file, none of NVIDIA's releases (MD5 {found}, {size:,} bytes)"
    release = RELEASED[found]
    renamed = "" if path.name == release[1] else f", renamed to {path.name}"
    if release == (repository, name):
        return True, f"NVIDIA's release {'/'.join(release)}{renamed}"
    return False, (f"NVIDIA's release {'/'.join(release)}{renamed}, but this config is for "
                   f"{repository}/{name}")


def verify(cfg) -> int:
    """Print what each file is that the config names; 1 if any is not NVIDIA's release, else 0."""
    wrong = 0
    for key, path, repository, name in expected(cfg):
        right, sentence = verdict(path, repository, name)
        wrong += not right
        print(f"{'ok   ' if right else 'NOT OK'} {key} {path}: {sentence}")
    return int(wrong > 0)
