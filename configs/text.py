"""Text embeddings in pickles, opened without running anything that a file asks for."""

import pickle
import re

import numpy as np
import torch
import torch.nn.functional as nnf

from configs.video import BadClip

NO_PICKLES = {  # what else is found under the name of a text file, by its first bytes
    b"PK": "a zip archive, as torch.save and numpy.savez write it",
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19": "a file of an old torch.save",
    b"\x93NUMPY": "a .npy array",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself",
    b"<": "a web page",
    b"\x1f\x8b": "a gzip file",
}
HOW = "write texts with pickle.dump([array], file), the array float32 or float16, a row a token"


class _Dtype:
    """Stands for numpy.dtype, whose own way of restoring itself crashes on an altered state."""

    def __init__(self, code, *options):
        if not re.fullmatch(r"[a-zA-Z]\d{0,4}", code):
            raise pickle.UnpicklingError(f"it holds an array of {code!r:.50}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state):  # (version, byte order, ...); the rest is for compound types
        self.dtype = self.dtype.newbyteorder(state[1])

    def array(self, content, shape, order):
        if self.dtype.hasobject:
            return np.array(None)  # of no use here; the entries, a list, are let go
        return np.frombuffer(content, self.dtype).reshape(shape, order=order)


class _Array:
    """Stands for numpy.ndarray; its `value` is the array."""

    def __setstate__(self, state):
        _, shape, dtype, fortran, content = state
        content = content.encode("latin1") if isinstance(content, str) else content
        self.value = dtype.array(content, shape, "F" if fortran else "C")


def _from_buffer(content, dtype, shape, order):  # as protocol 5 puts it
    array = _Array()
    array.value = dtype.array(content, shape, order)
    return array


class _ArraysOnly(pickle._Unpickler):  # the one in Python: no index in a file exhausts memory
    admitted = {  # what numpy's pickles ask for; numpy 2 says numpy._core for numpy 1's numpy.core
        "numpy.ndarray": _Array,
        "numpy.dtype": _Dtype,
        "numpy.core.multiarray._reconstruct": lambda *what: _Array(),
        "numpy.core.numeric._frombuffer": _from_buffer,
        "_codecs.encode": lambda text, encoding: text.encode("latin1"),  # the only encoding
    }

    def find_class(self, module, name):
        key = f"{module}.{name}".replace("numpy._core.", "numpy.core.")
        if key not in self.admitted:
            raise pickle.UnpicklingError(
                f"it asks for {key}; only numpy arrays and plain containers are admitted")
        return self.admitted[key]


def load_pickle(path):
    """Opens a pickle of numpy arrays and plain containers; of anything else nothing runs.

    Arrays are the `value` of an _Array.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(32)
            for magic, kind in NO_PICKLES.items():
                if start.startswith(magic):
                    raise BadClip(f"{path} is {kind}; {HOW}")
            file.seek(0)
            return _ArraysOnly(file).load()
    except FileNotFoundError:
        raise BadClip(f"{path} is missing") from None
    except BadClip:
        raise
    except Exception as error:  # damaged pickles raise every kind of error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadClip(f"{path} is not a usable pickle: {reason}; {HOW}") from error


def load_text(path, tokens, width):
    """A text embedding in any form that README lists, cut or zero-padded: float32 (tokens, width).

    Of several captions the first counts.
    """
    value = load_pickle(path)
    for key in ("pickle", "ground_truth", "embeddings", "t5_xxl"):
        value = value.get(key) if isinstance(value, dict) else value
    if isinstance(value, (list, tuple)) and value:
        value = value[0]
    value = getattr(value, "value", None)  # of an _Array
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
        raise BadClip(f"{path} holds no float array as such, in a list or in "
                      f"pickle/ground_truth/embeddings/t5_xxl; {HOW}")
    return text_rows(value[0] if value.ndim == 3 and len(value) else value, path, tokens, width)


def text_rows(rows, path, tokens, width):
    """An array of one row a token as the model takes it; BadClip, naming `path`, if it cannot."""
    if rows.ndim != 2 or rows.shape[1] != width:
        raise BadClip(f"{path} holds an array {rows.shape}; rows of width {width} are expected")
    with np.errstate(over="ignore"):
        rows = rows.astype(np.float32)
    if not np.isfinite(rows).all():
        raise BadClip(f"{path} holds values that are not finite; encode the caption again")
    if not rows[:tokens].any():
        raise BadClip(f"{path} holds only zeros, which is no caption; encode the caption again")
    rows = torch.from_numpy(rows)
    return nnf.pad(rows, (0, 0, 0, tokens - len(rows)))  # a negative pad cuts
