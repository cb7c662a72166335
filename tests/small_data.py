"""Small images and labels."""

import numpy as np
from PIL import Image

SIZE = (24, 32)  # of every image, H × W


def write_pair(image, label, values, rng):
    """Write random pixels and a label in which every one of `values` occurs."""
    height, width = SIZE
    ids = rng.choice(np.array(values, dtype=np.uint8), size=SIZE)
    ids.flat[: len(values)] = values
    for path, pixels in ((image, rng.integers(0, 256, (height, width, 3), dtype=np.uint8)), (label, ids)):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)


class Samples(list):
    """A data set, all of whose samples have labels."""

    labelled = property(len)
