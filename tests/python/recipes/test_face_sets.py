"""Verification sets: what InsightFace's tools and numpy write is read, and nothing that a pickle could run."""

import os
import pickle
import pickletools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("PIL")
from recipes.face.verification_sets import (  # noqa: E402
    VerificationSetError,
    parse_verification_set,
    read_verification_set,
    write_verification_set,
)

IMAGES = [b"\xff\xd8 one", b"\xff\xd8 two", b"three", b"four"]
SAME = [True, False]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "images",
    [IMAGES, tuple(IMAGES), [np.frombuffer(each, np.uint8) for each in IMAGES]],
    ids=["bytes", "tuple", "arrays"],
)
@pytest.mark.parametrize(
    "same", [SAME, tuple(SAME), [1, 0], np.array(SAME), [np.bool_(True), np.int64(0)]], ids=range(5)
)
def test_all_ways_to_write_one(images, same, protocol):
    if protocol == 5 and isinstance(images[0], np.ndarray):
        pytest.skip("numpy writes arrays by protocol 5 with a function of its own, which no set in the field has")
    if protocol == 5 and not isinstance(same, (list, tuple)):
        pytest.skip("the same")
    found = parse_verification_set(pickle.dumps((images, same), protocol=protocol))
    assert found.images == IMAGES and found.same == SAME
    assert all(type(each) is bool for each in found.same)


def test_python_2s_pickles():
    """str is bytes there, by STRING, BINSTRING and SHORT_BINSTRING."""
    by_hand = b"((lp0\nS'\\xff\\xd8 one'\np1\naT\x06\x00\x00\x00\xff\xd8 twoaU\x05threeaU\x04foura(lp2\nI01\naI00\nat."
    assert parse_verification_set(by_hand) == (IMAGES, SAME)


def test_numpys_old_names():
    """numpy.core before 2, numpy._core since; the tests' numpy writes one of them."""
    data = pickle.dumps(([np.frombuffer(each, np.uint8) for each in IMAGES], SAME), protocol=2)
    for old, new in (
        (b"numpy._core.multiarray", b"numpy.core.multiarray"),
        (b"numpy.core.multiarray", b"numpy._core.multiarray"),
    ):
        assert parse_verification_set(data.replace(old, new)).images == IMAGES


def test_round_trip(tmp_path):
    write_verification_set(tmp_path / "a.bin", IMAGES, SAME)
    assert read_verification_set(tmp_path / "a.bin") == (IMAGES, SAME)
    images, same = pickle.loads((tmp_path / "a.bin").read_bytes(), encoding="bytes")  # as their tools read it
    assert images == IMAGES and same == SAME
    with pytest.raises(VerificationSetError, match="expected two images a pair, but got 3 for 1 pairs"):
        write_verification_set(tmp_path / "b.bin", IMAGES[:3], [True])


class Runs:
    """What a hostile pickle is: a call of any function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize(
    "hostile",
    [
        Runs(os.system, "touch RAN"),
        Runs(eval, "open('RAN', 'w')"),
        Runs(subprocess.call, ["touch", "RAN"]),
        Runs(getattr, "", "format"),
        Runs(pickle.loads, b""),
        Runs(np.load, "RAN"),
        Runs(np.array, [1], "O"),
    ],
    ids=["system", "eval", "subprocess", "getattr", "loads", "load", "array"],
)
def test_hostile_pickles_are_refused(tmp_path, monkeypatch, protocol, hostile):
    monkeypatch.chdir(tmp_path)
    for whole in (hostile, (hostile, SAME), ([hostile, *IMAGES[1:]], SAME), (IMAGES, [hostile, False])):
        data = pickle.dumps(whole, protocol=protocol)
        with pytest.raises(VerificationSetError, match="which no verification set needs|Error"):
            parse_verification_set(data)
    assert not (tmp_path / "RAN").exists()


@pytest.mark.parametrize(
    "whole, said",
    [
        ((IMAGES, [True]), "4 images for 1 pairs"),
        (([], []), "0 images for 0 pairs"),
        (IMAGES, "not a pair of images and of which"),
        ((IMAGES, {1: 2}), "which no verification set needs"),
        ((IMAGES, "yes"), "are no list"),
        ((IMAGES[:3] + ["text"], SAME), "image 3 is a str, not bytes"),
        ((IMAGES[:3] + [b""], SAME), "image 3 is empty"),
        ((IMAGES[:3] + [np.zeros((2, 2), np.uint8)], SAME), "image 3 is an array of uint8 of shape"),
        ((IMAGES[:3] + [np.zeros(2)], SAME), "image 3 is an array of float64"),
        ((IMAGES[:3] + [np.array([b"a"], object)], SAME), "an array of 'O8'"),
        ((IMAGES, [True, 2]), "whether pair 1 is of one person is 2"),
        ((IMAGES, [True, None]), "whether pair 1 is of one person is None"),
    ],
)
def test_what_is_no_set_is_said(tmp_path, whole, said):
    path = tmp_path / "bad.bin"
    path.write_bytes(pickle.dumps(whole, protocol=2))
    with pytest.raises(VerificationSetError, match=said) as caught:
        read_verification_set(path)
    assert str(path) in str(caught.value)


def test_a_pickle_that_asks_for_memory():
    """A place in the unpickler's memory that it would make room for, 2^31 of them; an array that says it is large."""
    with pytest.raises(VerificationSetError, match="it remembers 2,147,483,647 things"):
        parse_verification_set(b"\x80\x02]r\xff\xff\xff\x7f.")
    data = pickle.dumps(([np.frombuffer(each, np.uint8) for each in IMAGES], SAME), protocol=2)
    assert b"K\x06\x85" in data
    with pytest.raises(VerificationSetError, match="of shape .2147483647,. with 6 numbers"):
        parse_verification_set(data.replace(b"K\x06\x85", b"J\xff\xff\xff\x7f\x85"))


ARRAYS = pickle.dumps(([np.frombuffer(b"abc", np.uint8)] * 2, [True]), protocol=2)


@pytest.mark.parametrize(
    "code, said",
    [
        (b"X\x02\x00\x00\x00u2", "it is damaged: ValueError: buffer size"),  # three bytes are no numbers of two
        (b"X\x00\x00\x00\x00", "it holds an array of ''"),
        (b"X\x02\x00\x00\x00u3", "it holds an array of '.?u3'"),
        (b"X\x05\x00\x00\x00u1,u1", "it holds an array of"),
        (b"X\x03\x00\x00\x00f16", "it holds an array of float128|it is damaged"),
        (b"]\x8c\x00a", "it holds an array of a list"),
    ],
)
def test_arrays_that_are_none(code, said):
    assert ARRAYS.count(b"X\x02\x00\x00\x00u1") == 1
    with pytest.raises(VerificationSetError, match=said):
        parse_verification_set(ARRAYS.replace(b"X\x02\x00\x00\x00u1", code))


@pytest.mark.parametrize(
    "place", [b"", b"c_codecs\nencode\nX\x00\x00\x00\x00", b"cnumpy\ndtype\n"], ids=["pair", "text", "array"]
)
def test_lists_of_themselves_are_not_written_out(place):
    """Fifty lists, each twice in the next: a text of them would have 2^50 elements."""
    lists = b"]q\x000" + b"".join(b"(h%ch%clq%c0" % (i, i, i + 1) for i in range(50)) + b"h\x32"
    hostile = {b"": lists}.get(place, place + lists + (b"\x86R" if b"encode" in place else b"\x85R"))
    with pytest.raises(VerificationSetError, match="a list"):
        parse_verification_set(b"\x80\x02](U\x01aU\x01ae](" + hostile + b"e\x86.")


def test_what_follows_the_end():
    with pytest.raises(VerificationSetError, match="something follows its end"):
        parse_verification_set(pickle.dumps((IMAGES, SAME), protocol=2) + b"more")


SOUND = [pickle.dumps((IMAGES, SAME), protocol=p) for p in (0, 2, 4)]
SOUND.append(pickle.dumps(([np.frombuffer(each, np.uint8) for each in IMAGES], np.array(SAME)), protocol=2))


@settings(max_examples=2000, deadline=None)
@given(st.sampled_from(SOUND), st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=6))
def test_damaged_sets_are_sets_or_refused(data, changes):
    damaged = bytearray(data)
    for place, byte in changes:
        damaged[place % len(damaged)] = byte
    _set_or_refused(bytes(damaged))


OPCODES = [each.code.encode("latin1") for each in pickletools.opcodes]


@settings(max_examples=2000, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.sampled_from(OPCODES),
            st.binary(max_size=5),
            st.sampled_from(
                [b"cos\nsystem\n", b"cnumpy\ndtype\n", b"cnumpy\nndarray\n", b"c_codecs\nencode\n", b"\x8c\x02os"]
            ),
        ),
        max_size=25,
    ).map(b"".join)
)
def test_any_opcodes_are_sets_or_refused(data):
    _set_or_refused(data + b".")


def _set_or_refused(data):
    try:
        found = parse_verification_set(data)
    except VerificationSetError:
        return
    assert len(found.images) == 2 * len(found.same) > 0
    assert all(type(each) is bytes for each in found.images) and all(type(each) is bool for each in found.same)


def test_nothing_is_imported(tmp_path):
    """find_class of the plain unpickler imports modules; ours does not."""
    (tmp_path / "bystander.py").write_text("open('RAN', 'w')")
    (tmp_path / "hostile.bin").write_bytes(b"\x80\x02cbystander\nx\n.")
    code = (
        "import sys; sys.path.insert(0, '.')\n"
        "from recipes.face.verification_sets import *\n"
        "try: read_verification_set('hostile.bin')\n"
        "except VerificationSetError as error: print(error)\n"
    )
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert "asks for bystander.x" in ran.stdout, ran.stderr
    assert not (tmp_path / "RAN").exists()
