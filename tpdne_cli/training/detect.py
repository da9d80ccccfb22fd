"""Faces as MediaPipe sees them: how many in an image, and where their eyes and mouths lie.

A detector that had no part in training judges what training made. MediaPipe 0.10.14 carries its models in its wheel,
but wants an older numpy than ours, so this file is also a script for an environment of its own, in which nothing of
tpdne needs to be installed:

    python -m venv faces && faces/bin/pip install mediapipe==0.10.14
    faces/bin/python tpdne_cli/training/detect.py images.npy > faces.json
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

SIDE = 128  # images are brought to this size before; positions are in its pixels
BORDER = 64  # grey around the image: the detector knows faces in scenes, not faces that fill the picture
GREY = 128
# Of the face mesh, left and right as the onlooker sees them: corners of an eye, inner lips, tip of the nose, corners
# of the mouth.
LANDMARKS = {
    "left_eye": (33, 133), "right_eye": (362, 263), "mouth": (13, 14),
    "nose": (1, 1), "left_corner": (61, 61), "right_corner": (291, 291),
}  # fmt: skip

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def find_faces(pixels: Pixels, python: str = sys.executable) -> list[dict[str, Any]]:
    """What MediaPipe, as `python` has it, sees in uint8 [N, 128, 128, 3].

    One dict per image: "faces" (their number), "confidence" (of the surest, 0 where there is none) and "points"
    (x, y of each of LANDMARKS, or None). Raises OSError or subprocess.CalledProcessError without MediaPipe.
    """
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images.npy"
        np.save(images, pixels)
        done = subprocess.run([python, __file__, str(images)], capture_output=True, text=True, check=True)
    seen: list[dict[str, Any]] = json.loads(done.stdout)
    return seen


def detect(pixels: Pixels) -> Iterator[dict[str, Any]]:
    """What find_faces gives, from the MediaPipe of this very interpreter. Raises ImportError without one."""
    solutions = importlib.import_module("mediapipe").solutions
    detector = solutions.face_detection.FaceDetection(model_selection=0, min_detection_confidence=0.5)
    mesh = solutions.face_mesh.FaceMesh(static_image_mode=True, max_num_faces=1, min_detection_confidence=0.5)
    with detector, mesh:
        for image in pixels:
            framed = np.pad(image, ((BORDER, BORDER), (BORDER, BORDER), (0, 0)), constant_values=GREY)
            found = detector.process(framed).detections or []
            confidence = max((f.score[0] for f in found), default=0.0)
            meshes = mesh.process(framed).multi_face_landmarks if found else None
            points = _points(meshes[0].landmark, framed.shape[0]) if meshes else None
            yield {"faces": len(found), "confidence": confidence, "points": points}


def _points(landmarks: Any, side: int) -> list[list[float]]:
    """Positions in the image without its border, from shares of the framed image."""
    corners = [[(landmarks[i].x, landmarks[i].y) for i in pair] for pair in LANDMARKS.values()]  # [6, 2, 2]
    centres: list[list[float]] = (np.asarray(corners).mean(1) * side - BORDER).round(2).tolist()
    return centres


if __name__ == "__main__":
    json.dump(list(detect(np.load(sys.argv[1]))), sys.stdout)
