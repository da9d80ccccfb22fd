"""training/metrics.py and what stands on it: known distributions, brute force, and memories that were planted."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from tpdne_cli.errors import TrainingError
from tpdne_cli.training import detect, directions, evaluate, features, memorisation, metrics


@pytest.fixture(autouse=True)
def small_and_in_pieces(monkeypatch):
    monkeypatch.setattr(metrics, "CHUNK", 7)
    monkeypatch.setattr(features, "BATCH", 16)
    monkeypatch.setattr(features, "RESOLUTION", 32)
    monkeypatch.setattr(features, "choose_dtype", lambda *_: torch.float32)


def covariance(size, seed):
    a = torch.from_numpy(np.random.RandomState(seed).randn(size, size))
    return a @ a.T + 0.1 * torch.eye(size)


def numpy_frechet(m, a, n, b):
    """By the eigenvalues of the unsymmetric product itself."""
    eigenvalues = np.linalg.eigvals(a.numpy() @ b.numpy())
    return float(((m - n) ** 2).sum() + a.trace() + b.trace()) - 2 * np.sqrt(eigenvalues.astype(complex)).real.sum()


def test_frechet_distance_of_independent_features_is_known():
    """Diagonal covariances: sum of (m - n)^2 + (s - t)^2."""
    m, n = torch.tensor([1.0, -2, 0]).double(), torch.tensor([0.0, 1, 0]).double()
    s, t = torch.tensor([1.0, 3, 0]).double(), torch.tensor([2.0, 0.5, 4]).double()
    got = metrics.frechet_distance((m, s.square().diag()), (n, t.square().diag()))
    assert got == pytest.approx(float(((m - n) ** 2 + (s - t) ** 2).sum()), rel=1e-12)


def test_frechet_distance_in_two_dimensions_has_a_closed_form():
    a, b = covariance(2, 1), covariance(2, 2)
    product = a @ b  # the root of a 2x2 matrix with eigenvalues x, y has the trace (x + y + 2 (x y)^1/2)^1/2
    root = (product.trace() + 2 * product.det().sqrt()).sqrt()
    zero = torch.zeros(2).double()
    got = metrics.frechet_distance((zero, a), (zero, b))
    assert got == pytest.approx(float(a.trace() + b.trace() - 2 * root), rel=1e-12)


@pytest.mark.parametrize("size", [1, 5, 40])
def test_frechet_distance_against_another_road(size):
    m, n = torch.randn(2, size, generator=torch.Generator().manual_seed(size)).double()
    a, b = covariance(size, 3), covariance(size, 4)
    expected = numpy_frechet(m, a, n, b)
    assert metrics.frechet_distance((m, a), (n, b)) == pytest.approx(expected, rel=1e-9)
    assert metrics.frechet_distance((n, b), (m, a)) == pytest.approx(expected, rel=1e-9), "symmetric"
    assert metrics.frechet_distance((m, a), (m, a)) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_bears_features_that_depend_on_each_other():
    few = torch.randn(5, 20, generator=torch.Generator().manual_seed(0))  # rank 4 of 20
    assert metrics.frechet_distance(metrics.moments(few), metrics.moments(few)) == pytest.approx(0, abs=1e-6)


def test_moments_are_numpys():
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    mean, cov = metrics.moments(x)
    assert mean.numpy() == pytest.approx(x.double().numpy().mean(0), rel=1e-12)
    assert cov.numpy() == pytest.approx(np.cov(x.double().numpy().T), rel=1e-12)


def brute_manifold_share(queries, references, k):
    inside = 0
    for q in queries:
        for r in references:
            reach = sorted(np.linalg.norm(references - r, axis=1))[k]
            if np.linalg.norm(q - r) <= reach:
                inside += 1
                break
    return inside / len(queries)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_against_brute_force(k):
    random = np.random.RandomState(k)
    real, fake = random.randn(45, 4), 0.7 * random.randn(40, 4) + 0.5
    precision, recall = metrics.precision_recall(torch.from_numpy(real), torch.from_numpy(fake), k)
    assert precision == brute_manifold_share(fake, real, k)
    assert recall == brute_manifold_share(real, fake, k)
    assert 0 < recall < 1 and 0 < precision < 1, "the test would not notice"


def test_nearest_against_brute_force():
    random = np.random.RandomState(0)
    queries, references = random.randn(20, 3), random.randn(30, 3)
    table = np.linalg.norm(queries[:, None] - references, axis=2)
    distance, row = metrics.nearest(torch.from_numpy(queries), torch.from_numpy(references))
    assert row.tolist() == table.argmin(1).tolist()
    assert distance.numpy() == pytest.approx(table.min(1), rel=1e-6)
    best = torch.from_numpy(table.argsort(1)[:, :2])
    _, third = metrics.nearest(torch.from_numpy(queries), torch.from_numpy(references), excluded=best)
    assert third.tolist() == table.argsort(1)[:, 2].tolist()


def photographs(count, side=32):
    return torch.randint(0, 256, [count, 3, side, side], generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def space(pictures):
    return memorisation.Space("pixels", memorisation.shrink(torch.cat([pictures, pictures.flip(3)])))


def test_planted_memories_are_found(tmp_path):
    real = photographs(60)
    fresh = 255 - real[:20]
    copies = torch.cat([real[50:], real[:10].flip(3)])
    report, distances, rows = memorisation.compare(memorisation.shrink(copies), space(real))
    assert rows.tolist() == [*range(50, 60), *range(60, 70)], "as they are, and mirrored"
    assert distances.max() < 1e-2
    assert report["closer_than_1_percent"] == 1
    assert memorisation.compare(memorisation.shrink(fresh), space(real))[0]["closer_than_1_percent"] < 0.2
    sheet = tmp_path / "pairs.png"
    memorisation.write_pairs(sheet, copies, real, [(distances, rows)])
    left, right = np.hsplit(np.asarray(Image.open(sheet))[:32, :64], 2)
    assert np.array_equal(left, right), "the photograph stands beside its copy, mirrored as the copy is"
    assert any(np.array_equal(left, copy.permute(1, 2, 0).numpy()) for copy in copies)


def test_the_yardstick_leaves_a_photograph_and_its_mirror_image_out():
    real = photographs(12)
    real[11] = real[3].flip(2)  # the same person twice, once mirrored
    distances = space(real).yardstick()
    assert [i for i, d in enumerate(distances.tolist()) if d < 1e-2] == [3, 11]


def test_shrunken_pixels_differ_in_levels_of_255():
    dark, light = torch.full([1, 3, 64, 64], 10).byte(), torch.full([1, 3, 64, 64], 30).byte()
    assert torch.cdist(memorisation.shrink(dark), memorisation.shrink(light)).item() == pytest.approx(20, rel=1e-5)


def labelled_zip(path, count=140, side=32):
    """Squares: light ones are called women, dark ones men; the last ones bear no label."""
    random = np.random.RandomState(0)
    table = io.StringIO()
    rows = csv.writer(table)
    rows.writerow(["file", "age", "gender"])
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(count):
            buffer, man = io.BytesIO(), (i + i // 10) % 2
            pixels = random.randint(0, 60, [side, side, 3]) + (10 if man else 180)
            Image.fromarray(pixels.astype(np.uint8)).save(buffer, "JPEG")
            archive.writestr(f"{i:03}.jpg", buffer.getvalue())
            age, gender = ("", "") if i >= count - 10 else (features.AGES[i % 6], features.GENDERS[man])
            rows.writerow([f"{i:03}.jpg", age, gender])
        archive.writestr("sources.csv", table.getvalue())
    return path


def test_features_learn_what_can_be_seen(tmp_path):
    labelled = features.load_labelled(labelled_zip(tmp_path / "faces.zip"))
    learn, held_out = labelled.splits
    assert len(learn) + len(held_out) == 130
    assert not set(learn.tolist()) & set(held_out.tolist())
    network, accuracy = features.train(labelled, epochs=3)
    assert accuracy["gender"] > 0.9, "light from dark"
    found = features.extract(network, labelled.pictures)
    assert found.shape == (140, features.WIDTHS[features.TEXTURE_STAGE] + features.WIDTHS[-1])
    assert found.mean(0).abs().max() < 1e-3
    _, genders = network.labels(found[held_out])
    assert (genders == labelled.genders[held_out]).double().mean().item() == pytest.approx(accuracy["gender"], abs=1e-4)
    path = tmp_path / "features.safetensors"
    features.save(network, path, accuracy)
    again, known = features.load(path)
    assert known == accuracy
    assert (features.extract(again, labelled.pictures[:4]) - found[:4]).abs().max() < 0.2, "float16 weights"


def test_a_table_that_does_not_fit(tmp_path):
    path = labelled_zip(tmp_path / "faces.zip", count=3)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("more.jpg", archive.read("000.jpg"))
    with pytest.raises(TrainingError, match="4 pictures and 3 lines"):
        features.load_labelled(path)


def test_a_feature_network_that_is_none(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"nothing")
    for missing in (path, tmp_path / "absent.safetensors"):
        with pytest.raises(TrainingError, match=r"python -m tpdne_cli\.training\.features"):
            features.load(missing)


STUB = """
from types import SimpleNamespace as S
class Detector:
    def __init__(self, **_): pass
    def __enter__(self): return self
    def __exit__(self, *_): pass
    def process(self, image):
        assert image.shape == (256, 256, 3) and (image[:64] == 128).all(), "128 px within a grey border"
        faces = [S(score=[0.9]), S(score=[0.8])][: int(image[64, 64, 0])]
        return S(detections=faces or None, multi_face_landmarks=[S(landmark=LANDMARKS)])
LANDMARKS = {33: S(x=0.4, y=0.4), 133: S(x=0.5, y=0.4), 362: S(x=0.6, y=0.4), 263: S(x=0.7, y=0.4),
             13: S(x=0.5, y=0.6), 14: S(x=0.5, y=0.7), 1: S(x=0.5, y=0.5), 61: S(x=0.4, y=0.6), 291: S(x=0.6, y=0.6)}
solutions = S(face_detection=S(FaceDetection=Detector), face_mesh=S(FaceMesh=Detector))
"""


def test_faces_are_counted_by_another_process(tmp_path, monkeypatch):
    (tmp_path / "mediapipe.py").write_text(STUB)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]))
    pixels = np.zeros([3, 128, 128, 3], np.uint8)
    pixels[1, 0, 0], pixels[2, 0, 0] = 1, 2
    nobody, one, two = detect.find_faces(pixels)
    assert nobody == {"faces": 0, "confidence": 0.0, "points": None}
    assert one["faces"] == 1 and two["faces"] == 2 and one["confidence"] == 0.9
    places = [(0.45, 0.4), (0.65, 0.4), (0.5, 0.65), (0.5, 0.5), (0.4, 0.6), (0.6, 0.6)]
    expected = [(x * 256 - 64, y * 256 - 64) for x, y in places]
    assert np.array(one["points"]) == pytest.approx(np.array(expected), abs=0.01)
    report, confidence = evaluate.detection(torch.from_numpy(pixels).permute(0, 3, 1, 2), sys.executable)
    assert (report["one_face"], report["no_face"]) == (0.3333, 0.3333)
    off = np.linalg.norm(np.array(expected[2]) - evaluate.PLACES[2])
    assert report["mouth_off_px"]["mean"] == pytest.approx(off, abs=0.01)
    assert confidence.tolist() == [0, 0.9, 0.9]
    shown = directions.measure(pixels, python=sys.executable)
    assert shown["smile"][1:] == pytest.approx(0.2 / 0.2, abs=1e-3), "width of the mouth, in distances of the eyes"
    assert shown["turn"][1:] == pytest.approx((0.5 - 0.55) / 0.2, abs=1e-3), "the nose beside the middle of the eyes"
    assert np.isnan(shown["turn"][0]) and np.isfinite(shown["light"]).all()


def test_photographs_are_measured_as_a_perfect_generator_would_be(tmp_path):
    """Those shown and those of the reference are strangers to each other, which costs distance."""
    random = torch.Generator().manual_seed(0)
    photographs = evaluate.Photographs(tmp_path, features.FeatureNet().eval(), tmp_path / "unused")
    found = torch.randn(400, features.WIDTHS[features.TEXTURE_STAGE] + features.WIDTHS[-1], generator=random)
    photographs.features = found  # two hundred, and two hundred that stand for their mirror images
    report = evaluate.floor(photographs, 1000, "")
    shown = photographs.some(100)
    rest = torch.tensor([i for i in range(400) if i % 200 not in set(shown.tolist())])
    expected = metrics.frechet_distance(metrics.moments(found[shown]), metrics.moments(found[rest]))
    with_themselves = metrics.frechet_distance(metrics.moments(found[shown]), metrics.moments(found))
    assert report["images"] == 100 and report["frechet"] == pytest.approx(expected, abs=1e-3)
    assert expected > 1.2 * with_themselves, "the test would not notice"


def test_precision_and_recall_compare_sets_of_one_size(tmp_path):
    random = torch.Generator().manual_seed(0)
    photographs = evaluate.Photographs(tmp_path, features.FeatureNet().eval(), tmp_path / "unused")
    photographs.features, fake = torch.randn(120, 4, generator=random), torch.randn(90, 4, generator=random)
    real = photographs.features
    report = evaluate.distances(fake, real, real[photographs.some(90)])
    expected = metrics.precision_recall(photographs.features[photographs.some(60)], fake[:60])
    assert (report["precision"], report["recall"]) == pytest.approx(expected, abs=1e-4)


def test_the_whole_evaluation(tmp_path, monkeypatch, capsys):
    """A random generator against squares: every number is there, and every sheet."""
    from test_critic import write_pair

    monkeypatch.setenv("TPDNE_HOME", str(tmp_path / "home"))
    data = labelled_zip(tmp_path / "faces.zip", count=80)
    features.save(features.FeatureNet().eval(), tmp_path / "features.safetensors", {"age": 0.5})
    options = ["--data", data, "--features", tmp_path / "features.safetensors", "--sheets", tmp_path / "sheets"]
    for _ in range(2):  # the second time with the photographs' features from the cache
        evaluate.main([str(write_pair(tmp_path)), "--images", "64", "--detector", "", *map(str, options)])
        report = json.loads(capsys.readouterr().out)
        assert report["truncation"]["1"]["frechet"] > report["photographs"]["frechet"]
        assert report["truncation"]["0.7"]["memorisation"]["pixels"]["closer_than_1_percent"] == 0
        assert set(report["truncation"]["1"]["critic"]) == {"quantiles", "lowest", "highest"}
        ages = report["photographs"]["balance"]
        assert sum(share for group, share in ages.items() if group != "women") == pytest.approx(1, abs=1e-3)
    assert [p.suffix for p in (tmp_path / "home" / "cache").glob("features-*")] == [".npy"]
    names = ["critic-highest", "critic-lowest", "pairs", "samples"]
    assert sorted(p.name for p in (tmp_path / "sheets").iterdir()) == [
        f"{n}-{p}.png" for n in names for p in ("0.7", "1")
    ]
