"""MXNet's RecordIO, as InsightFace's training sets have it (``train.rec`` and ``train.idx``), without mxnet.

A record is a little-endian magic number, a word of three bits (whole, first, middle, last part) and 29 bits of length,
and the payload, padded to four bytes. A magic number that stands at a multiple of four inside a payload splits it
there and is put back on reading. A payload here begins with a header: ``flag, label, id, id2``; where flag is not 0, so
many float32 labels follow. The index is a line ``key<TAB>offset`` for each record.

Record 0 of a training set says with flag 2 and labels (N + 1, M) that images are records 1 ... N and that records
N + 1 ... M - 1 are identities, each with the range of its images as labels. Without it every record is an image.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from recipes.face.errors import RecipeError

MAGIC = 0xCED7230A
_MAGIC_BYTES = struct.pack("<I", MAGIC)
_WORDS = struct.Struct("<II")
_HEADER = struct.Struct("<IfQQ")
_WHOLE, _FIRST, _MIDDLE, _LAST = range(4)
_MOST_BYTES = (1 << 29) - 1  # of a part
LARGEST_LABEL = 1 << 24  # float32 holds all whole numbers up to it


class RecordError(RecipeError):
    """A file that is not what it should be; the message names the record."""


class Header(NamedTuple):
    flag: int
    label: tuple[float, ...]  # one, or `flag` of them
    id: int
    id2: int


class Record(NamedTuple):
    header: Header
    payload: bytes


# ---- payloads and records ------------------------------------------------------------------------------------------


def pack_header(label: float | Iterable[float], key: int, payload: bytes = b"") -> bytes:
    """A payload with its header: flag 0 for one label, their number for several."""
    if isinstance(label, (int, float)):
        return _HEADER.pack(0, label, key, 0) + payload
    labels = tuple(label)
    return _HEADER.pack(len(labels), 0.0, key, 0) + struct.pack(f"<{len(labels)}f", *labels) + payload


def unpack_header(data: bytes) -> Record:
    """Raises RecordError where the data is shorter than its header says."""
    if len(data) < _HEADER.size:
        raise RecordError(f"{len(data)} bytes are no header, which has {_HEADER.size}")
    flag, label, id_, id2 = _HEADER.unpack_from(data)
    if flag == 0:
        return Record(Header(0, (label,), id_, id2), data[_HEADER.size :])
    end = _HEADER.size + 4 * flag
    if end > len(data):
        raise RecordError(f"its header says {flag} labels, but there are {len(data) - _HEADER.size} bytes")
    labels = struct.unpack_from(f"<{flag}f", data, _HEADER.size)
    return Record(Header(flag, labels, id_, id2), data[end:])


def _parts(payload: bytes) -> Iterator[tuple[int, bytes]]:
    """What stands between the magic numbers at multiples of four, with what each part is."""
    cuts, found = [], payload.find(_MAGIC_BYTES)
    while found >= 0:
        if found % 4 == 0:
            cuts.append(found)
            found = payload.find(_MAGIC_BYTES, found + 4)
        else:
            found = payload.find(_MAGIC_BYTES, found + 1)
    begins = [0, *(cut + 4 for cut in cuts)]
    for place, (begin, end) in enumerate(zip(begins, [*cuts, len(payload)])):
        if not cuts:
            kind = _WHOLE
        elif place == 0:
            kind = _FIRST
        else:
            kind = _LAST if place == len(cuts) else _MIDDLE
        yield kind, payload[begin:end]


def write_record(file: BinaryIO, payload: bytes) -> None:
    for kind, part in _parts(payload):
        if len(part) > _MOST_BYTES:
            raise RecordError(f"a payload of {len(payload):,} bytes is too long for a record")
        file.write(_WORDS.pack(MAGIC, kind << 29 | len(part)))
        file.write(part + bytes(-len(part) % 4))


def _read_part(descriptor: int, offset: int, what: str) -> tuple[int, bytes, int]:
    words = os.pread(descriptor, _WORDS.size, offset)
    if len(words) < _WORDS.size:
        raise RecordError(f"{what}: the file ends at byte {offset + len(words):,}, before its length")
    magic, word = _WORDS.unpack(words)
    if magic != MAGIC:
        raise RecordError(f"{what}: at byte {offset:,} stands {magic:#010x} and no record")
    length = word & _MOST_BYTES
    part = os.pread(descriptor, length, offset + _WORDS.size)
    if len(part) < length:
        raise RecordError(f"{what}: the file ends {length - len(part):,} bytes before its end")
    return word >> 29, part, offset + _WORDS.size + (length + 3) // 4 * 4


def read_record(descriptor: int, offset: int, what: str = "a record") -> bytes:
    """The payload at an offset. Safe from several threads and processes: nothing is sought."""
    kind, payload, offset = _read_part(descriptor, offset, what)
    if kind == _WHOLE:
        return payload
    if kind != _FIRST:
        raise RecordError(f"{what}: it begins with a part {kind}, neither whole nor first")
    parts = [payload]
    while kind != _LAST:
        kind, part, offset = _read_part(descriptor, offset, what)
        if kind not in (_MIDDLE, _LAST):
            raise RecordError(f"{what}: a part {kind} follows where a middle or last one should")
        parts.append(part)
    return _MAGIC_BYTES.join(parts)


# ---- indexed files -------------------------------------------------------------------------------------------------


def read_index(path: str | Path) -> dict[int, int]:
    """key -> offset."""
    index: dict[int, int] = {}
    for number, line in enumerate(Path(path).read_text(encoding="ascii", errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        try:
            key, offset = (int(word) for word in line.split("\t"))
        except ValueError:
            raise RecordError(f"{path}, line {number}: expected 'key<TAB>offset', but got {line[:40]!r}") from None
        if key in index or offset < 0:
            raise RecordError(f"{path}, line {number}: key {key} stands there twice, or its offset is negative")
        index[key] = offset
    return index


class RecordFile:
    """A ``.rec`` file by its ``.idx``: ``file[key]`` is a Record. It can be pickled, and shared after a fork."""

    def __init__(self, path: str | Path, index: str | Path | None = None) -> None:
        self._descriptor: int | None = None
        self.path = Path(path)
        self.index_path = Path(index) if index is not None else self.path.with_suffix(".idx")
        if not self.index_path.exists():
            raise RecordError(f"{self.path} has no index: expected {self.index_path}")
        self.offsets = read_index(self.index_path)

    @property
    def descriptor(self) -> int:
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY)
        return self._descriptor

    def read(self, key: int) -> bytes:
        if key not in self.offsets:
            raise RecordError(f"{self.path} has no record {key}")
        return read_record(self.descriptor, self.offsets[key], f"{self.path}, record {key}")

    def __getitem__(self, key: int) -> Record:
        data = self.read(key)
        try:
            return unpack_header(data)
        except RecordError as error:
            raise RecordError(f"{self.path}, record {key}: {error}") from None

    def __len__(self) -> int:
        return len(self.offsets)

    def __contains__(self, key: int) -> bool:
        return key in self.offsets

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> RecordFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_descriptor": None}

    def __del__(self) -> None:
        self.close()


class TrainingRecords:
    """The images of an InsightFace training set: ``records[i]`` is (encoded image, label)."""

    def __init__(self, path: str | Path) -> None:
        self.file = RecordFile(path)
        first = self.file[0] if 0 in self.file else None
        self.identities: int | None = None  # that the set says it has
        if first is not None and first.header.flag > 0:
            if any(not 0 < each <= LARGEST_LABEL for each in first.header.label):
                raise RecordError(f"{self.file.path}, record 0: {first.header.label} are no numbers of records")
            last = int(first.header.label[0])
            self.keys = list(range(1, last))
            if len(first.header.label) > 1:
                self.identities = int(first.header.label[1]) - last
            missing = next((key for key in self.keys if key not in self.file), None)
            if missing is not None:
                raise RecordError(
                    f"{self.file.path}: record 0 says {len(self.keys):,} images, but there is no {missing}"
                )
        else:
            self.keys = sorted(self.file.offsets)
        if not self.keys:
            raise RecordError(f"{self.file.path} has no images")

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, place: int) -> tuple[bytes, int]:
        key = self.keys[place]
        record = self.file[key]
        label = record.header.label[0]
        if not (0 <= label <= LARGEST_LABEL and label == int(label)):
            raise RecordError(f"{self.file.path}, record {key}: {label} is no class")
        return record.payload, int(label)

    def labels(self) -> Iterator[int]:
        """Of all images, in order: reads their headers, not the images."""
        for place, key in enumerate(self.keys):
            head = os.pread(self.file.descriptor, _WORDS.size + _HEADER.size + 4, self.file.offsets[key])
            if (
                len(head) < _WORDS.size + _HEADER.size + 4
                or _WORDS.unpack_from(head)[1] & _MOST_BYTES < _HEADER.size + 4
            ):
                yield self[place][1]  # cut short, or to pieces
                continue
            flag, label, _, _ = _HEADER.unpack_from(head, _WORDS.size)
            value = label if flag == 0 else struct.unpack_from("<f", head, _WORDS.size + _HEADER.size)[0]
            sound = _WORDS.unpack_from(head)[0] == MAGIC and 0 <= value <= LARGEST_LABEL and value == int(value)
            yield int(value) if sound else self[place][1]  # which says what is wrong

    def count_classes(self) -> int:
        """One more than the largest label: of all headers, for records say how many identities there are, not which."""
        return max(self.labels()) + 1


class RecordWriter:
    """Writes a training set: images, then what it says of itself. Nothing of that name exists before close()."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._partial = self.path.with_suffix(".rec.partial")
        self._file = self._partial.open("wb")
        self._offsets: dict[int, int] = {}
        self._labels: list[int] = []
        self._seen: set[int] = set()
        self._write(0, pack_header((0.0, 0.0), 0))  # its place; written again at the end

    def _write(self, key: int, payload: bytes) -> None:
        self._offsets[key] = self._file.tell()
        write_record(self._file, payload)

    def add(self, image: bytes, label: int) -> int:
        """The image's key. Images of a class follow each other: an identity is a range."""
        if not 0 <= label <= LARGEST_LABEL:
            raise RecordError(f"expected a label in [0, {LARGEST_LABEL:,}], which float32 holds, but got {label}")
        if self._labels and label != self._labels[-1] and label in self._seen:
            raise RecordError(f"the images of class {label} do not follow each other")
        key = len(self._labels) + 1
        self._write(key, pack_header(float(label), key, image))
        self._labels.append(label)
        self._seen.add(label)
        return key

    def close(self) -> None:
        images = len(self._labels)
        begin = 1
        key = images + 1
        for place in range(1, images + 1):
            if place == images or self._labels[place] != self._labels[place - 1]:
                self._write(key, pack_header((float(begin), float(place + 1)), key))
                begin, key = place + 1, key + 1
        if key > LARGEST_LABEL:
            raise RecordError(f"{images:,} images are too many for a header of float32")
        self._file.seek(0)
        write_record(self._file, pack_header((float(images + 1), float(key)), 0))
        self._file.close()
        lines = "".join(f"{key}\t{offset}\n" for key, offset in sorted(self._offsets.items()))
        self.path.with_suffix(".idx").write_text(lines, encoding="ascii")
        self._partial.replace(self.path)

    def discard(self) -> None:
        self._file.close()
        self._partial.unlink(missing_ok=True)
