"""RecordIO beside mxnet: data/by_mxnet.rec was written once by mxnet 1.9.1's MXIndexedRecordIO."""

import os
import pickle
import struct
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("PIL")
from recipes.face.records import (  # noqa: E402
    MAGIC,
    RecordError,
    RecordFile,
    RecordWriter,
    TrainingRecords,
    pack_header,
    read_record,
    unpack_header,
    write_record,
)

BY_MXNET = Path(__file__).parent / "data/by_mxnet.rec"
MAGIC_BYTES = struct.pack("<I", MAGIC)
WITH_MAGIC = MAGIC_BYTES + b"ab" + MAGIC_BYTES + b"c" * 6 + 2 * MAGIC_BYTES + b"tail"  # at 0, 6, 16, 20


def test_what_mxnet_wrote():
    records = TrainingRecords(BY_MXNET)
    assert len(records) == 4 and records.identities == 2 and records.count_classes() == 2
    assert [label for _, label in (records[i] for i in range(4))] == [0, 0, 1, 1] == list(records.labels())
    assert records[2] == (WITH_MAGIC, 1)
    assert records[0][0].startswith(b"\x89PNG")
    assert records.file[6].header.label == (3.0, 5.0)


def test_the_same_bytes_as_mxnet(tmp_path):
    """What is read there and written here is the same file."""
    records = TrainingRecords(BY_MXNET)
    writer = RecordWriter(tmp_path / "again.rec")
    for image, label in (records[i] for i in range(4)):
        writer.add(image, label)
    assert not (tmp_path / "again.rec").exists()
    writer.close()
    again = RecordFile(tmp_path / "again.rec")
    original = RecordFile(BY_MXNET)
    assert again.offsets == original.offsets
    for key in original.offsets:
        assert again[key].header.label == original[key].header.label and again[key].payload == original[key].payload
    # mxnet leaves the identities' own ids as they are given; all else is the same, byte for byte.
    assert (tmp_path / "again.rec").read_bytes() == BY_MXNET.read_bytes()


pieces = st.lists(st.one_of(st.binary(max_size=9), st.just(MAGIC_BYTES)), max_size=12).map(b"".join)


@settings(max_examples=300, deadline=None)
@given(st.lists(pieces, min_size=1, max_size=4))
def test_any_payload_comes_back(payloads):
    offsets = []
    with tempfile.TemporaryFile() as file:
        for payload in payloads:
            offsets.append(file.tell())
            write_record(file, payload)
        file.flush()
        for offset, payload in zip(offsets, payloads):
            assert offset % 4 == 0 and read_record(file.fileno(), offset) == payload


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=80))
def test_headers_of_any_bytes(data):
    try:
        record = unpack_header(data)
    except RecordError:
        return
    assert len(record.header.label) == max(1, record.header.flag)


@pytest.mark.parametrize("label", [3.0, (1.0, 2.0, 5.0), ()])
def test_headers(label):
    record = unpack_header(pack_header(label, 9, b"image"))
    labels = (label,) if isinstance(label, float) else label or (0.0,)
    assert record.header.label == labels and record.header.id == 9 and record.payload == b"image"


def _copy(tmp_path, change, index=None):
    data = bytearray(BY_MXNET.read_bytes())
    change(data)
    path = tmp_path / "bad.rec"
    path.write_bytes(data)
    path.with_suffix(".idx").write_text(index or BY_MXNET.with_suffix(".idx").read_text())
    return path


@pytest.mark.parametrize(
    "change, key, said",
    [
        (
            lambda d: d.__setitem__(slice(340, 344), b"oops"),
            2,
            r"record 2: at byte 340 stands 0x73706f6f and no record",
        ),
        (lambda d: d.__delitem__(slice(1080, None)), 6, r"record 6: the file ends \d+ bytes before its end"),
        (lambda d: d.__delitem__(slice(1054, None)), 6, r"record 6: the file ends at byte 1,054, before its length"),
        (lambda d: d.__setitem__(647, 0x60), 3, r"record 3: it begins with a part 3, neither whole nor first"),
        (lambda d: d.__setitem__(679, 0x00), 3, r"record 3: a part 0 follows where a middle or last one should"),
        (
            lambda d: d.__setitem__(slice(1060, 1064), b"\xff\xff\xff\x00"),
            6,
            r"record 6: its header says 16777215 labels",
        ),
    ],
)
def test_a_broken_record_is_named(tmp_path, change, key, said):
    path = _copy(tmp_path, change)
    with RecordFile(path) as file, pytest.raises(RecordError, match=said):
        file[key]


@pytest.mark.parametrize(
    "index, said",
    [
        ("0\t0\n1 40\n", "line 2: expected 'key<TAB>offset', but got '1 40'"),
        ("0\t0\n0\t40\n", "line 2: key 0 stands there twice"),
        ("0\t0\n1\t40\n", "record 0 says 4 images, but there is no 2"),
    ],
)
def test_a_broken_index_is_named(tmp_path, index, said):
    with pytest.raises(RecordError, match=said):
        TrainingRecords(_copy(tmp_path, lambda d: None, index))


def test_without_an_index(tmp_path):
    (tmp_path / "a.rec").write_bytes(b"")
    with pytest.raises(RecordError, match="has no index: expected .*a.idx"):
        RecordFile(tmp_path / "a.rec")


def test_images_alone_without_a_first_record_of_numbers(tmp_path):
    """Flag 0 of record 0, or no such record: every record is an image; a vector's first label counts."""
    path = tmp_path / "plain.rec"
    offsets = []
    with path.open("wb") as file:
        for key, label in ((3, 7.0), (5, (2.0, 0.5))):
            offsets.append((key, file.tell()))
            write_record(file, pack_header(label, key, b"image %d" % key))
    path.with_suffix(".idx").write_text("".join(f"{key}\t{offset}\n" for key, offset in offsets))
    records = TrainingRecords(path)
    assert [records[0], records[1]] == [(b"image 3", 7), (b"image 5", 2)]
    assert list(records.labels()) == [7, 2] and records.count_classes() == 8 and records.identities is None


@pytest.mark.parametrize("label", [-1.0, 0.5, float("nan"), float("inf")])
def test_a_label_that_is_no_class(tmp_path, label):
    path = tmp_path / "a.rec"
    with path.open("wb") as file:
        write_record(file, pack_header(label, 0, b"image"))
    path.with_suffix(".idx").write_text("0\t0\n")
    records = TrainingRecords(path)
    with pytest.raises(RecordError, match="a.rec, record 0: .* is no class"):
        records[0]
    with pytest.raises(RecordError, match="is no class"):
        list(records.labels())


def test_labels_of_a_file_that_is_cut_short(tmp_path):
    """Inside the labels of its last record: the record is named, as where it is read whole."""
    path = tmp_path / "a.rec"
    with path.open("wb") as file:
        write_record(file, pack_header((1.0, 2.0), 0, b"image"))
    path.with_suffix(".idx").write_text("1\t0\n")
    assert list(TrainingRecords(path).labels()) == [1]
    os.truncate(path, 33)
    with pytest.raises(RecordError, match="a.rec, record 1: the file ends 12 bytes before its end"):
        list(TrainingRecords(path).labels())


def test_writers_refuse_what_readers_could_not_tell(tmp_path):
    writer = RecordWriter(tmp_path / "a.rec")
    for label in (0, 1):
        writer.add(b"image", label)
    with pytest.raises(RecordError, match="images of class 0 do not follow each other"):
        writer.add(b"image", 0)
    for label in (-1, (1 << 24) + 1):
        with pytest.raises(RecordError, match="expected a label in"):
            writer.add(b"image", label)
    writer.discard()
    assert not list(tmp_path.iterdir())


def test_files_go_to_workers(tmp_path):
    records = TrainingRecords(BY_MXNET)
    first = records[0]
    again = pickle.loads(pickle.dumps(records))
    assert again.file._descriptor is None and again[0] == first
