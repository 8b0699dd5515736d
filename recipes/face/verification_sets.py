"""InsightFace's verification sets (``lfw.bin``): pickles of encoded images and of which pairs are of one person.

A pickle can run any program, so these are read by an unpickler that makes nothing but lists, tuples, bytes, text,
numbers and plain numpy arrays: numpy's own functions are not called for them, stand-ins take the arrays' bytes.
"""

from __future__ import annotations

import codecs
import io
import math
import pickle
import pickletools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from recipes.face.errors import RecipeError


class VerificationSetError(RecipeError):
    """A file that is no verification set, or one that is not to be trusted."""


class VerificationSet(NamedTuple):
    images: list[bytes]  # encoded, two a pair
    same: list[bool]  # a pair each


# ---- what a pickle may hold ----------------------------------------------------------------------------------------

_KINDS = "buif"  # of arrays: booleans and numbers


def _shown(value: object) -> str:
    """For a message. NB: what a pickle made may be lists of itself, of which a text would have no end."""
    if value is None or isinstance(value, bool) or (isinstance(value, (int, np.integer)) and abs(int(value)) < 1000):
        return str(value)
    return repr(value[:8]) if isinstance(value, str) else f"a {type(value).__name__}"


def _numbers(data: object, dtype: object) -> np.ndarray[Any, Any]:
    """The bytes of an array or a scalar as its stand-in holds them, text of old pickles too."""
    if isinstance(data, str):
        data = data.encode("latin1")
    if not isinstance(dtype, _Dtype) or not isinstance(data, bytes):
        raise VerificationSetError("it holds an array of objects")
    return np.frombuffer(data, dtype.resolved())


class _Dtype:
    """Stands for numpy.dtype: its code, which numpy looks at only once it is found to be harmless."""

    __slots__ = ("order", "text")

    def __init__(self, text: object = None, *_: object) -> None:
        if isinstance(text, bytes):
            text = text.decode("ascii", "replace")
        if not isinstance(text, str) or len(text) > 8 or text.lstrip("<>|=")[:1] not in list(_KINDS):
            raise VerificationSetError(f"it holds an array of {_shown(text)}")
        self.text = text
        self.order = ""

    def __setstate__(self, state: object) -> None:
        if isinstance(state, tuple) and len(state) > 1:
            order = state[1].decode("ascii", "replace") if isinstance(state[1], bytes) else state[1]
            if order in ("<", ">", "|", "="):
                self.order = str(order)

    def resolved(self) -> np.dtype[Any]:
        text = self.text if self.text[0] in "<>|=" else self.order + self.text
        try:
            dtype = np.dtype(text)
        except TypeError:
            raise VerificationSetError(f"it holds an array of {text!r}") from None
        if dtype.kind not in _KINDS or dtype.itemsize > 8:
            raise VerificationSetError(f"it holds an array of {dtype}")
        return dtype


class _Array:
    """Stands for numpy.ndarray: its shape, dtype and bytes."""

    __slots__ = ("state",)

    def __init__(self, *_: object) -> None:
        self.state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state

    def resolved(self) -> np.ndarray[Any, Any]:
        state = self.state
        if not (isinstance(state, tuple) and len(state) == 5):
            raise VerificationSetError("it holds an array without numbers")
        _, shape, dtype, _, data = state
        array = _numbers(data, dtype)
        if not isinstance(shape, tuple) or not all(isinstance(each, int) and each >= 0 for each in shape):
            raise VerificationSetError("it holds an array without a shape")
        if math.prod(shape) != array.size:
            raise VerificationSetError(f"it holds an array of shape {shape} with {array.size} numbers")
        return array.reshape(shape)  # NB: of images one dimension, so that order is of no matter


class _Scalar:
    """Stands for numpy.core.multiarray.scalar."""

    __slots__ = ("data", "dtype")

    def __init__(self, dtype: object = None, data: object = b"") -> None:
        self.dtype, self.data = dtype, data

    def resolved(self) -> Any:
        values = _numbers(self.data, self.dtype)
        if values.size != 1:
            raise VerificationSetError("it holds a number that is none")
        return values[0]


def _encode(text: object = "", encoding: object = "latin1", *_: object) -> bytes:
    """Stands for _codecs.encode, by which old pickles spell bytes."""
    if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):
        raise VerificationSetError(f"it encodes by {_shown(encoding)}")
    return codecs.encode(text, "latin1")


def _bytes(*parts: object) -> bytes:
    """Stands for bytes(), which pickles call for empty ones."""
    if parts:
        raise VerificationSetError("it calls bytes() with arguments")
    return b""


def _reconstruct(*_: object) -> _Array:
    return _Array()


_ALLOWED: dict[tuple[str, str], Any] = {
    ("_codecs", "encode"): _encode,
    ("builtins", "bytes"): _bytes,
    ("__builtin__", "bytes"): _bytes,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
}
for _module in ("numpy.core.multiarray", "numpy._core.multiarray"):
    _ALLOWED[_module, "_reconstruct"] = _reconstruct
    _ALLOWED[_module, "scalar"] = _Scalar


_OPCODES = frozenset(
    "PROTO FRAME STOP MARK POP POP_MARK EMPTY_LIST APPEND APPENDS LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 NONE "
    "NEWTRUE NEWFALSE INT LONG BININT BININT1 BININT2 LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING "
    "BINBYTES SHORT_BINBYTES BINBYTES8 UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 GET BINGET LONG_BINGET PUT "
    "BINPUT LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL REDUCE BUILD".split()
)


_BY_CODE: dict[str, Any] = {each.code: each for each in pickletools.opcodes}


def _check_opcodes(data: bytes) -> None:
    """Nothing runs here: what is no part of such a set is refused before anything does."""
    file = io.BytesIO(data)
    count = 0
    while True:
        code = file.read(1).decode("latin1")
        opcode = _BY_CODE.get(code)
        if opcode is None or opcode.name not in _OPCODES:
            what = f"a {opcode.name}" if opcode is not None else (f"an opcode {code!r}" if code else "no end")
            raise VerificationSetError(f"it has {what}, which no verification set needs")
        count += 1
        if opcode.name == "STRING":  # of bytes, which pickletools takes for ASCII
            file.readline()
            continue
        argument: Any = opcode.arg.reader(file) if opcode.arg is not None else None
        # The unpickler makes room for so many.
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > count:
            raise VerificationSetError(f"it remembers {argument:,} things after {count:,}")
        if opcode.name == "STOP":
            return


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise VerificationSetError(f"it asks for {module}.{name}, which no verification set needs") from None


def _unpickle(data: bytes) -> object:
    """NB: encoding="bytes", for Python 2 wrote text where bytes are meant."""
    file = io.BytesIO(data)
    _check_opcodes(data)
    found = _Restricted(file, encoding="bytes").load()
    if file.read(1):
        raise VerificationSetError("something follows its end")
    return found


# ---- verification sets ---------------------------------------------------------------------------------------------


def _image(found: object, place: int) -> bytes:
    if isinstance(found, (bytes, bytearray)):
        image = bytes(found)
    elif isinstance(found, _Array):
        array = found.resolved()
        if array.dtype != np.uint8 or array.ndim != 1:
            raise VerificationSetError(
                f"image {place} is an array of {array.dtype} of shape {array.shape}, not of bytes"
            )
        image = array.tobytes()
    else:
        raise VerificationSetError(f"image {place} is a {type(found).__name__}, not bytes")
    if not image:
        raise VerificationSetError(f"image {place} is empty")
    return image


def _same(found: object, place: int) -> bool:
    value = found.resolved() if isinstance(found, _Scalar) else found
    if isinstance(value, (bool, np.bool_)) or (isinstance(value, (int, np.integer)) and int(value) in (0, 1)):
        return bool(value)
    raise VerificationSetError(f"whether pair {place} is of one person is {_shown(value)}, neither true nor false")


def parse_verification_set(data: bytes) -> VerificationSet:
    """Of a file's bytes. VerificationSetError says what is wrong with them; nothing of them has run then."""
    try:
        return _parse(data)
    except VerificationSetError:
        raise
    except RecursionError:
        raise VerificationSetError("it is nested too deeply") from None
    except MemoryError:
        raise VerificationSetError("it asks for more memory than there is") from None
    except Exception as error:  # of a pickle that is damaged or hostile: whatever its numbers led to
        raise VerificationSetError(f"it is damaged: {type(error).__name__}: {error}"[:200]) from None


def _parse(data: bytes) -> VerificationSet:
    found = _unpickle(data)
    if not isinstance(found, (tuple, list)) or len(found) != 2:
        raise VerificationSetError("it is not a pair of images and of which are of one person")
    images, same = found
    if isinstance(same, _Array):
        same = same.resolved().tolist()
    if not isinstance(images, (tuple, list)) or not isinstance(same, (tuple, list)):
        raise VerificationSetError("its images, or which pairs are of one person, are no list")
    if len(images) != 2 * len(same) or not same:
        raise VerificationSetError(f"it has {len(images)} images for {len(same)} pairs")
    return VerificationSet(
        [_image(each, place) for place, each in enumerate(images)],
        [_same(each, place) for place, each in enumerate(same)],
    )


def read_verification_set(path: str | Path) -> VerificationSet:
    """A ``.bin`` file. VerificationSetError names it."""
    try:
        return parse_verification_set(Path(path).read_bytes())
    except VerificationSetError as error:
        raise VerificationSetError(f"{path}: {error}") from None


def write_verification_set(path: str | Path, images: Sequence[bytes], same: Sequence[bool]) -> None:
    """As InsightFace's tools read it: lists of bytes and of bools, by protocol 2."""
    if len(images) != 2 * len(same) or not same:
        raise VerificationSetError(f"expected two images a pair, but got {len(images)} for {len(same)} pairs")
    whole = ([bytes(each) for each in images], [bool(each) for each in same])
    Path(path).write_bytes(pickle.dumps(whole, protocol=2))
