"""Seeded damage to every kind of file that the trainer reads, and what comes of it, counted.

    python tests/fuzz.py [--kind config pickle ...] [--count 1500] [--seed 0] [--first N] [--show]

A script, no test: it takes minutes a kind. Half of the cases of a kind are damage (flipped bits,
cut, zeroed, exchanged parts), the others are crafted with knowledge of the format: its checksums
made right again, calls of a program put in. Each is opened the way training opens it, in a process
that may die of it, and ends as one of

    same        opened, with the values of the undamaged file
    other       opened, with other values (which a format without checksums cannot tell)
    sentence    refused: one sentence that names the file
    traceback   any other exception, or a message that does not name the file or the key
    hang, died  out of time; the process ended
    executed    a program or a function named in the file ran
"""

import argparse
import collections
import contextlib
import copy
import functools
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import pickletools
import re
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import convert  # noqa: E402
import data  # noqa: E402
import model as m  # noqa: E402
import tokenizer as tk  # noqa: E402
import tp  # noqa: E402
import train  # noqa: E402
from configs import rehearsal  # noqa: E402
from configs.schema import load_config  # noqa: E402

FAULTS = ["traceback", "hang", "died", "executed"]
OUTCOMES = ["same", "other", "sentence", *FAULTS]
SMALL = """\
model: {max_img_h: 16, max_img_w: 16, max_frames: 8, model_channels: 16, num_blocks: 2,
        num_heads: 2, num_control_blocks: 1, adaln_lora_dim: 4, crossattn_emb_channels: 16}
data: {root: random, hint: lidar, num_frames: 9, height: 16, width: 32}
trainer: {precision: float32}
checkpoint: {base_path: random}
"""


# ---- damage ------------------------------------------------------------------------------------

def somewhere(rng, size):
    """A position, at either end of the data for two times out of three."""
    end = min(size, 512)
    begin, close = rng.integers(end + 1), size - rng.integers(end + 1)
    return int(rng.choice([rng.integers(size + 1), begin, close]))


def damage(rng, raw):
    """One to three ways of ordinary damage."""
    raw = bytearray(raw)
    for _ in range(rng.integers(1, 4)):
        a, b = sorted(somewhere(rng, len(raw)) for _ in range(2))
        b = min(b, a + int(rng.choice([1, 4, 64, 4096, 1 << 30])))
        kind = rng.integers(9)
        if kind <= 1 and raw:
            for place in rng.integers(len(raw), size=rng.choice([1, 1, 4, 16])):
                raw[place] ^= 1 << rng.integers(8)
        elif kind == 2:
            del raw[int(rng.integers(len(raw) + 1)):]
        elif kind == 3:
            raw[a:b] = bytes(b - a)
        elif kind == 4:
            raw[a:a] = rng.bytes(rng.choice([1, 7, 300]))
        elif kind == 5:
            del raw[a:b]
        elif kind == 6:
            raw[a:b], raw[-(b - a):] = raw[-(b - a):], raw[a:b]
        elif kind == 7:
            number = int(rng.choice([0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1]))
            raw[a:a + 8] = number.to_bytes(8, str(rng.choice(["little", "big"])))
        else:
            raw[a:b] = rng.bytes(b - a)
    return bytes(raw)


# ---- crafted -----------------------------------------------------------------------------------

class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile(rng, canary):
    """Pickle opcodes, without header and end, that leave a file `canary` when they are run."""
    calls = [Call(os.system, f"touch {canary}"), Call(open, str(canary), "w"),
             Call(exec, f"open({str(canary)!r}, 'w')"), Call(os.mkdir, str(canary)),
             Call(functools.partial(os.system), f"touch {canary}"),
             Call(torch.save, 1, str(canary)), Call(np.save, str(canary), 1),
             Call(shutil.copy, __file__, str(canary))]
    raw = pickle.dumps(calls[rng.integers(len(calls))], protocol=2)
    return raw[2:-1]


NAMES = ["os\nsystem", "builtins\neval", "collections\nOrderedDict", "torch\nload", "numpy\nload",
         "io\nBytesIO", "torch._utils\n_rebuild_tensor_v2", "torch\nFloatStorage", "numpy\nndarray",
         "torch._utils\n_rebuild_parameter", "numpy.core.multiarray\n_reconstruct", "nothing\nhere"]


def craft_pickle(rng, raw, canary):
    """Takes out, doubles, exchanges or alters opcodes, or puts a call in between two."""
    ends = [pos for _, _, pos in pickletools.genops(raw)] + [len(raw)]
    ops = [raw[a:b] for a, b in zip(ends, ends[1:])]
    for _ in range(rng.integers(1, 4)):
        i, j = rng.integers(1, len(ops), size=2) if len(ops) > 1 else (0, 0)
        kind = rng.integers(9)
        if kind == 0:
            ops.insert(i, hostile(rng, canary) + b"0" * int(rng.integers(2)))
        elif kind == 1:
            ops[i] = hostile(rng, canary)
        elif kind == 2 and len(ops) > 2:
            del ops[i]
        elif kind == 3:
            ops[i], ops[j] = ops[j], ops[i]
        elif kind == 4:
            ops.insert(i, ops[j])
        elif kind == 5:
            ops[i] = b"c" + rng.choice(NAMES).encode() + b"\n"
        elif kind == 6:
            ops[i] = ops[i][:1] + damage(rng, ops[i][1:])
        elif kind == 7:
            ops[i] = pickle.dumps(some_value(rng), protocol=2)[2:-1]
        else:
            ops[:i] = [b"\x80\x04"] + [b"("] * int(rng.choice([3, 5000]))
    return b"".join(ops)


def some_value(rng):
    values = [0, -1, 2**31, 2**70, 1.5, float("nan"), float("inf"), "", "x" * 3000, "O8", "V9999",
              None, True, (), (1 << 40, 1 << 20), [], {}, {"a": {}}, b"", {1: 2}, ("storage", 1)]
    return values[rng.integers(len(values))]


def craft_zip(rng, raw, canary):
    """Alters the contents, names or number of a zip's entries; its checksums are right again."""
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        entries = [[info.filename, archive.read(info)] for info in archive.infolist()]
    compression = zipfile.ZIP_STORED
    for _ in range(rng.integers(1, 3)):
        pickles = [entry for entry in entries if entry[0].endswith(".pkl")]
        entry = entries[rng.integers(len(entries))]
        if pickles and rng.random() < 0.5:
            entry = pickles[rng.integers(len(pickles))]
        kind = rng.integers(10)
        if kind <= 3 and entry[0].endswith(".pkl"):
            with contextlib.suppress(ValueError):  # an earlier round left no valid opcodes
                entry[1] = craft_pickle(rng, entry[1], canary)
        elif kind <= 4:
            entry[1] = damage(rng, entry[1])
        elif kind == 5 and len(entries) > 1:
            entries.remove(entry)
        elif kind == 6:
            entry[0] = str(rng.choice(["../" + str(canary), entry[0] + "x", "data.pkl", str(canary),
                                       entry[0].rpartition("/")[2], entries[0][0]]))
        elif kind == 7:
            other = entries[rng.integers(len(entries))]
            entry[1], other[1] = other[1], entry[1]
        elif kind == 8:
            entries.append([entry[0], entries[rng.integers(len(entries))][1]])
        elif rng.random() < 0.9:
            compression = zipfile.ZIP_DEFLATED
        else:  # a bomb
            entry[1], compression = bytes(1 << 26), zipfile.ZIP_DEFLATED
    out = io.BytesIO()
    with (warnings.catch_warnings(),
          zipfile.ZipFile(out, "w", compression, compresslevel=1) as archive):
        warnings.simplefilter("ignore")  # doubled names
        for name, content in entries:
            archive.writestr(name, content)
    return out.getvalue()


def craft_safetensors(rng, raw, canary):
    """Alters the header: types, shapes, offsets, names, its length."""
    size = int.from_bytes(raw[:8], "little")
    header, body = json.loads(raw[8:8 + size]), raw[8 + size:]
    for _ in range(rng.integers(1, 4)):
        names = [name for name in header if isinstance(header[name], dict)]
        name = names[rng.integers(len(names))]
        entry, kind = header[name], rng.integers(9)
        if kind == 0:
            kinds = ["F64", "F8_E4M3", "BOOL", "I8", "X", "", "F32", "BF16"]
            entry["dtype"] = kinds[rng.integers(len(kinds))]
        elif kind == 1:
            entry["shape"] = some_json(rng)
        elif kind == 2:
            entry["data_offsets"] = some_json(rng)
        elif kind == 3:
            del header[name]
        elif kind == 4:
            header[name + "x"] = header.pop(name)
        elif kind == 5:
            header[name] = some_json(rng)
        elif kind == 6:
            header[name] = copy.deepcopy(header[names[rng.integers(len(names))]])
        elif kind == 7 and isinstance(entry.get("shape"), list):
            entry["shape"] = [entry["shape"], entry["shape"][::-1] + [1]][rng.integers(2)]
        else:
            body = damage(rng, body)
        header = header or {"a": {}}
    text = json.dumps(header).encode()
    length = len(text) if rng.random() < 0.9 else int(rng.choice([0, 1, 2**40, 2**63 - 1]))
    return length.to_bytes(8, "little") + text + body


def some_json(rng):
    values = [[], [0], [-1, 5], [2**62, 2**62], [1.5], None, "x", [[1]], [0, 4], {}, 7, [0, 2**63],
              [10, 0]]
    return values[rng.integers(len(values))]


VALUES = [
    "", "null", "~", ".inf", "-.inf", ".nan", "-1", "0", "1e400", "1e-400", "7", "1000000007",
    "99999999999999999999", "true", "[1, 2]", "{a: b}", "[]", "'x'", "2001-01-01", "0x10", "1_000",
    "'\\0'", "&a [*a]", "!!python/object/apply:os.system ['touch CANARY']", "*nothing",
    "!!python/name:os.system",
    "[" * 3000, "{a: " * 2000, "x" * 100000, "random", "synthetic", "lidar", "t2w",
    "../../../..", "/dev/zero", "/proc/self/mem", "|", ">", "!!binary aGk=", "!!set {a, b}",
    "\u00e9\u4e2d", "\x07", "- a", "? a", "3", "16", "1e6"]
BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n"
                                  for a, b in zip("abcdefgh", "bcdefghi"))
LINES = ["base: {}", "base: .", "base: /dev/null", "base: config.yaml", "base: [a]", BOMB, "---",
         "%YAML 9", "base: nowhere.yaml", "base: 3", "<<: *a", "? [a]\n: b", "1: 2",
         "null: {a: 1}", "trainer:\n  1: 2"]


def craft_config(rng, raw, canary):
    """Alters lines of the YAML: values, keys, indents; doubles, drops, exchanges them."""
    lines = raw.decode().splitlines()
    for _ in range(rng.integers(1, 4)):
        i, j = rng.integers(len(lines), size=2)
        key, colon, value = lines[i].partition(":")
        kind = rng.integers(12)
        if kind <= 5:
            lines[i] = f"{key}: {rng.choice(VALUES).replace('CANARY', str(canary))}"
        elif kind == 6 and len(lines) > 1:
            del lines[i]
        elif kind == 7:
            lines.insert(j, lines[i])
        elif kind == 8:
            lines[i], lines[j] = lines[j], lines[i]
        elif kind == 9:
            lines[i] = " " * int(rng.integers(9)) + lines[i].strip()
        elif kind == 10:
            lines[i] = f"{damage(rng, key.encode()).decode(errors='replace')}:{value}"
        else:
            lines.insert(0 if rng.random() < 0.7 else j, LINES[rng.integers(len(LINES))])
    return "\n".join(lines).encode()


BOXES = (rb"ftyp|moov|mvhd|trak|tkhd|edts|elst|mdia|mdhd|hdlr|minf|stbl|stsd|avc1|avcC|stts|stss|"
         rb"ctts|stsc|stsz|stco|mdat")


def craft_mp4(rng, raw, canary):
    """Alters sizes, types and tables of the boxes, which hold all but the pictures."""
    boxes = [match.start() for match in re.finditer(BOXES, raw)]
    raw = bytearray(raw)
    for _ in range(rng.integers(1, 4)):
        at, kind = boxes[rng.integers(len(boxes))], rng.integers(5)
        if kind == 0:
            size = int(rng.choice([0, 1, 7, 8, 2**31 - 1, 2**32 - 1, rng.integers(2000)]))
            raw[at - 4:at] = size.to_bytes(4, "big")
        elif kind == 1:
            raw[at:at + 4] = rng.choice([b"free", b"skip", b"moov", b"trak", b"xxxx", b"mdat"])
        elif kind == 2:
            number = int(rng.choice([0, 1, 0xffffffff, 0x7fffffff, 0x10000]))
            place = at + 4 + 4 * int(rng.integers(12))
            raw[place:place + 4] = number.to_bytes(4, "big")
        elif kind == 3:
            place = at + 4 + int(rng.integers(60))
            raw[place:place + 1] = bytes([rng.integers(256)])
        else:
            other = boxes[rng.integers(len(boxes))]
            raw[at:at + 40], raw[other:other + 40] = raw[other:other + 40], raw[at:at + 40]
    return bytes(raw)


# ---- kinds of files ----------------------------------------------------------------------------

def digest(value):
    """Tells values apart: tensors, arrays and containers of plain values."""
    seen = hashlib.sha256()

    def add(x):
        if isinstance(x, torch.Tensor):
            add([str(x.dtype), list(x.shape)])
            seen.update(x.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(x, dict):
            for key in sorted(x, key=str):
                add(str(key))
                add(x[key])
        elif isinstance(x, (list, tuple)):
            for item in x:
                add(item)
        elif isinstance(x, np.ndarray):
            add(torch.from_numpy(x))
        else:
            seen.update(repr(x).encode())

    add(value)
    return seen.hexdigest()


class Kind:
    """Files to alter in `folder`, how to craft them, and `open()`: the values that come of them."""

    files, craft = [], staticmethod(craft_zip)

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir(parents=True)
        self.make()
        self.original = {name: (folder / name).read_bytes() for name in self.files}

    def config(self):
        (self.folder / "small.yaml").write_text(SMALL)
        return load_config(self.folder / "small.yaml")


class ConfigFile(Kind):
    files, craft = ["config.yaml", "flow.yaml"], staticmethod(craft_config)

    def make(self):
        text = (ROOT / "configs/lidar.yaml").read_text()
        text = re.sub(" *#.*", "", text).replace("model_channels: 4096", "model_channels: 64")
        (self.folder / "config.yaml").write_text(text)
        (self.folder / "flow.yaml").write_text(SMALL)
        keys = load_config(self.folder / "flow.yaml").flat()
        self.words = ["config", *keys, *(key.partition(".")[2] for key in keys)]

    def open(self, name):
        out, err = io.StringIO(), io.StringIO()
        os.environ["OUTPUT_ROOT"] = str(self.folder / "runs")
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = train.main([str(self.folder / name), "--dryrun"])
        message = err.getvalue().strip()
        if status and re.search(r"\b(%s)\b" % "|".join(self.words), message):
            message += f" ({name})"  # the key at fault is named: that does instead of the file
        if status:
            raise ValueError(message)
        return out.getvalue()


class Text(Kind):
    files, craft = ["list.pkl", "nested.pkl", "half.pkl"], staticmethod(craft_pickle)

    def make(self):
        for name, form in zip(self.files, rehearsal.CAPTIONS):
            rehearsal.draw_text(0, 32, form, self.folder / name)

    def open(self, name):
        return data.load_text(self.folder / name, 64, 32)


class Base(Kind):
    files = ["base.pt"]

    def make(self):
        self.cfg = self.config()
        shapes = m.build(self.cfg.model, "meta", torch.bfloat16)
        item = rehearsal.checkpoint_item(self.folder / "base.pt", self.cfg, shapes, "base")
        item.write(item.path)

    def open(self, name):
        model = m.build(self.cfg.model, "cpu", torch.float32)
        cfg = copy.deepcopy(self.cfg)
        cfg.checkpoint.base_path = str(self.folder / name)
        with contextlib.redirect_stdout(io.StringIO()):
            train.check_weights(cfg, m.build(cfg.model, "meta", torch.float32))
            train.load_weights(cfg, model)
        return {n: t for n, t in model.state_dict().items() if n.startswith(("base.", "logvar."))}


class RunCheckpoint(Kind):
    files = ["checkpoints/iter_000000010.pt", "checkpoints/iter_000000010_model_mp_0.pt",
             "checkpoints/iter_000000010_optim_mp_0.pt", "checkpoints/latest_checkpoint.txt"]

    def make(self):
        os.environ["OUTPUT_ROOT"] = str(self.folder.parent / "train")
        cfg = self.config()
        words = ["trainer.max_iter=10", "checkpoint.save_iter=10", "trainer.val_iter=0"]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            assert train.main([str(self.folder / "small.yaml"), *words]) == 0
        shutil.copytree(cfg.run_dir / "checkpoints", self.folder / "checkpoints")
        self.model = m.build(cfg.model, "cpu", torch.float32)

    def open(self, name):
        found = convert.find_resume(self.folder)
        if found is None:
            raise ValueError(f"{name} is gone")  # as if no checkpoint had ever been there
        step, path = found
        trained = {f"control.{n}": torch.zeros(p.shape)
                   for n, p in self.model.control.named_parameters() if p.requires_grad}
        into = {kind: {n: t.clone() for n, t in trained.items()}
                for kind in ("ema", "master", "exp_avg", "exp_avg_sq")}
        convert.resume(path, into)
        meta = convert.read_file(path)["extra"]
        with contextlib.redirect_stdout(io.StringIO()):
            convert.merge(path, self.folder / "merged")
        return [step, meta, into]


class Clip(Kind):
    files, craft = ["clip.mp4", "grey.mp4"], staticmethod(craft_mp4)

    def make(self):
        rehearsal.draw_video("videos", 0, 20, 48, 80, self.folder / "clip.mp4")
        rehearsal.draw_video("lidar", 1, 20, 48, 80, self.folder / "grey.mp4")

    def open(self, name):
        path = self.folder / name
        frames = data.decode(path, 2, 9)
        return [tuple(data.probe(path)), frames, data.fit(frames, 48, 80)[0]]


class Setstate(torch.nn.Module):
    """A TorchScript archive of it writes a file when torch.jit.load opens it."""

    def __init__(self, path: str):
        super().__init__()
        self.weight, self.path = torch.nn.Parameter(torch.ones(2)), path

    @torch.jit.export
    def __getstate__(self):
        return (self.weight, self.path, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, str, bool]):
        self.weight = state[0]
        self.path = state[1]
        self.training = state[2]
        torch.save(self.weight, self.path)

    def forward(self, x):
        return x


class Archive(Kind):
    files = ["encoder.jit", "decoder.jit", "mean_std.pt"]

    def make(self):
        rehearsal.CHANNELS = 4
        rehearsal.draw_tokenizer.cache_clear()
        for item in rehearsal.tokenizer_items(self.folder, self.config()):
            item.write(item.path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            half = torch.jit.script(Setstate(str(self.folder / "CANARY")))
            half.save(str(self.folder / "hostile.jit"))
        self.hostile = (self.folder / "hostile.jit").read_bytes()

    def craft(self, rng, raw, canary):
        if rng.random() < 0.1:
            raw = self.hostile
        return raw if raw is self.hostile and rng.random() < 0.3 else craft_zip(rng, raw, canary)

    def open(self, name):
        with contextlib.redirect_stdout(io.StringIO()):
            net = tk.load_tokenizer(self.folder, dtype=torch.float32)
        return [net.state_dict(), net.mean, net.std]


class Safetensors(Kind):
    files, craft = ["tokenizer.safetensors"], staticmethod(craft_safetensors)

    def make(self):
        tensors = tk.Tokenizer(4).state_dict()
        tensors |= {"mean": torch.zeros(16, 4), "std": torch.ones(16, 4)}
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        rehearsal.save_file(tensors, self.folder / self.files[0])

    def open(self, name):
        with contextlib.redirect_stdout(io.StringIO()):
            net = tk.load_tokenizer(self.folder / name, dtype=torch.float32)
        return [net.state_dict(), net.mean, net.std]


KINDS = {"config": ConfigFile, "pickle": Text, "base": Base, "run": RunCheckpoint, "mp4": Clip,
         "jit": Archive, "safetensors": Safetensors}


# ---- a case ------------------------------------------------------------------------------------

def try_open(kind, name, expected):
    """(outcome, detail) of opening a file of a kind."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ("same" if digest(kind.open(name)) == expected else "other"), ""
        except BaseException as error:  # whatever it is, it would end a run
            message, plain = str(error).strip(), (ValueError, FileNotFoundError, data.BadClip)
            named = Path(name).name.split(".")[0] in message or str(kind.folder) in message
            if type(error) in plain and named and "\n" not in message[:2000]:
                return "sentence", message
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(where.filename).name}:{where.lineno}"
            return "traceback", f"{type(error).__name__} {message[:150]!r} at {place}"


def run_case(kind, number, seed, expected):
    rng = np.random.default_rng([seed, zlib.crc32(type(kind).__name__.encode()), number])
    name = kind.files[number // 2 % len(kind.files)]
    path, canary = kind.folder / name, kind.folder / "CANARY"
    crafted = number % 2 == 1
    if crafted and not name.endswith(".txt"):
        raw = kind.craft(rng, kind.original[name], canary)
    else:
        raw = damage(rng, kind.original[name])
        if kind.craft is craft_config and number % 4:  # else nearly all would fail to be UTF-8
            raw = raw.decode(errors="replace").encode()
    path.write_bytes(raw)
    outcome, detail = try_open(kind, name, expected[name])
    if canary.exists() or canary.is_symlink():
        outcome = "executed"
        shutil.rmtree(canary, ignore_errors=True)
        canary.unlink(missing_ok=True)
    if raw == kind.original[name] and outcome == "same":
        detail = "unchanged"
    path.write_bytes(kind.original[name])
    return outcome, detail


def work(kind_class, folder, numbers, seed, pipe):
    """Cases one after another; tells the parent when each begins and how it ended."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
    sys.stdout = sys.stderr = open(os.devnull, "w")
    kind = kind_class(folder)
    expected = {name: digest(kind.open(name)) for name in kind.files}
    for number in numbers:
        pipe.send((number, None, ""))
        pipe.send((number, *run_case(kind, number, seed, expected)))
    pipe.send((None, None, ""))


def run_kind(name, numbers, seed, workers, timeout, scratch):
    """{number: (outcome, detail)} of all cases of a kind, spread over processes."""
    results, context = {}, multiprocessing.get_context("fork")
    queues = [collections.deque(numbers[i::workers]) for i in range(workers)]
    running = {}

    def start(i):
        parent, child = context.Pipe()
        folder = Path(tempfile.mkdtemp(dir=scratch)) / name
        arguments = KINDS[name], folder, list(queues[i]), seed, child
        process = context.Process(target=work, args=arguments)
        process.start()
        child.close()
        running[i] = [process, parent, None, time.monotonic()]

    def give_up(i, outcome):
        process, _, number, _ = running.pop(i)
        process.kill()
        process.join()
        if number is None:
            raise RuntimeError(f"{name}: the undamaged files do not open")
        results[number] = outcome, f"exit code {process.exitcode}"
        queues[i] = collections.deque(n for n in queues[i] if n not in results)
        if queues[i]:
            start(i)

    for i in range(workers):
        start(i)
    while running:
        for i, entry in list(running.items()):
            process, pipe, number, since = entry
            try:
                if pipe.poll(0.02):
                    said, outcome, detail = pipe.recv()
                    if said is None:
                        process.join()
                        del running[i]
                    elif outcome is None:
                        entry[2:] = [said, time.monotonic()]
                    else:
                        results[said] = outcome, detail
                elif number is not None and time.monotonic() - since > timeout:
                    give_up(i, "hang")
            except EOFError:
                give_up(i, "died")
    return results


def report(name, results, show):
    """Prints the counts of a kind and one case of every fault; returns the number of faults."""
    for parity, title in enumerate(("damaged", "crafted")):
        counts = collections.Counter(o for n, (o, _) in results.items() if n % 2 == parity)
        numbers = "".join(f"{counts[outcome]:>11}" for outcome in OUTCOMES)
        print(f"{name + ', ' + title:<24}{numbers}", flush=True)
    groups = collections.defaultdict(list)
    for number, (outcome, detail) in sorted(results.items()):
        if outcome in FAULTS or show and outcome == "sentence":
            alike = re.sub(r"/tmp/\S*|'[^']*'|0x\w+|\d+", "#", detail)
            groups[outcome, alike].append((number, detail))
    for (outcome, _), cases in sorted(groups.items(), key=lambda group: -len(group[1])):
        print(f"    {outcome}: {len(cases)} x, case {cases[0][0]}: {cases[0][1][:300]}")
    return sum(outcome in FAULTS for outcome, _ in results.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--count", type=int, default=1500)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=60, help="seconds a case")
    parser.add_argument("--show", action="store_true", help="the different sentences, too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'':<24}" + "".join(f"{outcome:>11}" for outcome in OUTCOMES), flush=True)
    numbers, faults = range(options.first, options.first + options.count), 0
    for name in options.kind:
        with tempfile.TemporaryDirectory() as scratch:
            results = run_kind(name, numbers, options.seed, options.workers, options.timeout,
                               scratch)
        faults += report(name, results, options.show)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
