"""The detector beside facenet-pytorch's, which has the same weights, and its regions beside torch's in float64."""

import hashlib
import warnings

import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("torchvision")
from recipes.face import detection  # noqa: E402
from recipes.face.detection import Detector, DetectorError, Face  # noqa: E402

from photographs import astronaut, group, without_faces  # noqa: E402  (and where the oracles are)

try:
    detection.find_weights()
except DetectorError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture(scope="module")
def facenet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("facenet_pytorch").MTCNN(min_face_size=20)


PHOTOS = {
    "one face": lambda: astronaut(),
    "turned by 15 degrees": lambda: astronaut().rotate(15),
    "large": lambda: astronaut().resize((1100, 1100)),
    "eight faces": group,
    "a strip of it": lambda: group().crop((100, 150, 700, 420)),
    "no face": without_faces,
}


@pytest.mark.parametrize("name", PHOTOS)
def test_beside_facenet_pytorch(name, facenet):
    photo = PHOTOS[name]()
    found = Detector(min_score=0.0)(photo)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        boxes, scores, landmarks = facenet.detect(photo, landmarks=True)
    if boxes is None:
        assert found == []
        return
    assert len(found) == len(boxes)
    assert [face.score for face in found] == sorted((face.score for face in found), reverse=True)
    order = sorted(range(len(scores)), key=lambda place: -scores[place])
    mine = torch.tensor(
        [[face.score, *face.box, *(each for point in face.landmarks for each in point)] for face in found]
    )
    theirs = torch.cat(
        [
            torch.as_tensor(each.astype("float32")).flatten(1)
            for each in (scores[order, None], boxes[order], landmarks[order])
        ],
        1,
    )
    # Means of regions are exact here and in float32 there: 1e-7 of a pixel's value, through three networks.
    torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-3)
    assert len(found) == {"no face": len(found), "eight faces": 8, "a strip of it": len(found)}.get(name, 1)


def test_the_astronaut_is_where_she_is():
    (face,) = Detector()(astronaut())
    left, top, right, bottom = face.box
    assert 160 < left < 190 and 60 < top < 90 and 265 < right < 285 and 155 < bottom < 190
    assert face.area == pytest.approx((right - left) * (bottom - top))
    eyes, nose, mouth = face.landmarks[:2], face.landmarks[2], face.landmarks[3:]
    assert eyes[0][0] < nose[0] < eyes[1][0] and max(eye[1] for eye in eyes) < nose[1] < min(end[1] for end in mouth)


def test_a_higher_score_is_asked_for():
    scores = [face.score for face in Detector(min_score=0.0)(group())]
    assert [face.score for face in Detector()(group())] == [score for score in scores if score >= 0.9]


@pytest.mark.parametrize("size", [(1, 1), (11, 300), (300, 11), (12, 12), (20, 20), (33, 300)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_small_pictures_and_other_modes(size, mode):
    Image = pytest.importorskip("PIL.Image")
    assert Detector()(Image.new(mode, size)) == []


@pytest.mark.parametrize(
    ("height", "width", "to"), [(37, 53, (11, 17)), (24, 24, (24, 24)), (5, 7, (12, 12)), (90, 31, (24, 24))]
)
def test_regions_are_torchs_area_means(height, width, to):
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 97, 101), generator=generator, dtype=torch.uint8)
    boxes = torch.tensor([[3, 5, 3 + width, 5 + height], [0, 0, width, height], [101 - width, 97 - height, 101, 97]])
    found = detection._Areas(image).resized(boxes, *to)
    for row, (left, top, right, bottom) in zip(found, boxes.tolist()):
        part = image[None, :, top:bottom, left:right].double()
        wanted = (torch.nn.functional.interpolate(part, size=to, mode="area") - 127.5) / 128
        torch.testing.assert_close(row, wanted[0].float(), rtol=0, atol=1e-7)


def test_of_boxes_inside_each_other_the_best_is_kept():
    boxes = torch.tensor([[0.0, 0, 99, 99], [10, 10, 49, 49], [0, 60, 99, 159], [200, 200, 240, 240]])
    scores = torch.tensor([0.8, 0.9, 0.7, 0.95])
    # The second lies in the first; the third shares 40 of 100 rows with it.
    assert detection._without_insiders(boxes, scores, 0.7).tolist() == [3, 1, 2]
    assert detection._without_insiders(boxes[:0], scores[:0], 0.7).tolist() == []


def test_weights_are_known_bytes_or_are_not_read(tmp_path, monkeypatch):
    joblib = pytest.importorskip("joblib")
    monkeypatch.setattr(joblib, "load", lambda *_: pytest.fail("it was read"))
    folder = detection.find_weights()
    for name, sha256 in detection.WEIGHTS.items():
        data = bytearray((folder / f"{name}.lz4").read_bytes())
        assert hashlib.sha256(data).hexdigest() == sha256
        data[len(data) // 2] ^= 1
        (tmp_path / f"{name}.lz4").write_bytes(data)
        with pytest.raises(DetectorError, match=f"{name}.lz4 is not the file of mtcnn 1.0.0"):
            detection.read_weights(tmp_path, name)
    with pytest.raises(DetectorError, match="is not there; it is of mtcnn 1.0.0"):
        Detector(weights=tmp_path / "nowhere")


def test_without_the_package(monkeypatch):
    monkeypatch.setattr(detection.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(DetectorError, match="pip install mtcnn==1.0.0"):
        Detector()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"min_face": 11}, "min_face to be at least 12 pixels, but got 11"),
        ({"min_face": float("inf")}, "min_face"),
        ({"min_score": 1.5}, r"min_score in \[0, 1\], but got 1.5"),
        ({"factor": 1.0}, r"factor in \(0, 1\), but got 1.0"),
    ],
)
def test_bad_options(options, text):
    with pytest.raises(DetectorError, match=text):
        Detector(**options)


def test_an_empty_box_has_no_area():
    assert Face((5, 5, 3, 9), 1.0, ()).area == 0.0
