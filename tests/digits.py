"""Says how many generated digits are recognised: `python tests/digits.py SAMPLES.png`.

The picture has a row of samples for each digit 0 to 9; the judge is scikit-learn's SVC, trained on
the real digits of the training split, brought to the same 8x8 pixels.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.svm import SVC

from bitgen import data

SIZE = 32


def pixels(images: np.ndarray) -> np.ndarray:
    """uint8 [n, 32, 32, 3] -> [n, 64], the mean of each 4x4 block in [0, 1]."""
    blocks = images.reshape(len(images), 8, 4, 8, 4, 3).astype(np.float64)
    return blocks.mean((2, 4, 5)).reshape(len(images), 64) / 255


def split(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the real digits of a split and their labels."""
    settings: Any = data.default_config()
    settings.image_size, settings.split = SIZE, name
    batches = list(data.make_batches(settings, batch_size=100, seed=0, training=False))
    images = np.concatenate([batch["image"] for batch in batches])
    return pixels(images), np.concatenate([batch["label"] for batch in batches])


def judge() -> tuple[SVC, float]:
    """Returns the classifier and its accuracy on the held-out digits."""
    classifier = SVC(gamma="scale").fit(*split("train"))
    return classifier, float(classifier.score(*split("test")))


def recognised(picture: str | Path, classifier: SVC) -> np.ndarray:
    """Returns for each row of a picture how many of its digits are recognised as the row's."""
    picture = np.asarray(Image.open(picture).convert("RGB"))
    rows, columns = picture.shape[0] // SIZE, picture.shape[1] // SIZE
    cells = picture.reshape(rows, SIZE, columns, SIZE, 3).swapaxes(1, 2)
    found = classifier.predict(pixels(cells.reshape(-1, SIZE, SIZE, 3))).reshape(rows, columns)
    return (found == np.arange(rows)[:, None]).sum(1)


def main(argv: list[str]) -> int:
    """Prints the counts; returns 1 below 90 percent."""
    classifier, accuracy = judge()
    counts = recognised(argv[1], classifier)
    columns = np.asarray(Image.open(argv[1])).shape[1] // SIZE
    print(f"classifier: {accuracy:.1%} of held-out real digits")
    print(f"recognised: {counts.sum()} of {len(counts) * columns}, a row each {counts.tolist()}")
    return int(counts.sum() < 0.9 * len(counts) * columns)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
