"""Files after an accident."""

import numpy as np
from PIL import Image

from transkd.data import Pair


def write_many(images, labels, count, rng):
    """Pairs in two folders, with one image in four as JPEG and all else as PNG."""
    pairs = []
    for i in range(count):
        image = images / f"{i:03}{'.jpg' if i % 4 == 0 else '.png'}"
        label = labels / f"{i:03}.png"
        noise = rng.integers(0, 60, (32, 64, 3))
        Image.fromarray((noise + np.linspace(0, 190, 64)[:, None]).astype(np.uint8)).save(image)
        Image.fromarray(rng.integers(0, 11, (32, 64), dtype=np.uint8)).save(label)
        pairs.append(Pair(image, label))
    return pairs


def damaged(content, kind, rng):
    """A file's bytes after an accident; the place is drawn."""
    place = int(rng.integers(0, len(content)))
    changed = bytearray(content)
    if kind == "cut":
        return bytes(changed[:place])
    if kind == "zeros to the end":
        changed[place:] = bytes(len(changed) - place)
    elif kind == "a foreign block":
        changed[place : place + 64] = rng.bytes(len(changed[place : place + 64]))
    elif kind == "one bit":
        changed[place] ^= 1 << int(rng.integers(0, 8))
    elif kind == "bytes put in":
        changed[place:place] = rng.bytes(16)
    elif kind == "text":
        return b"<html>not found</html>"
    return bytes(changed)


# without checksums a JPEG with one wrong bit is a picture like any other
SEEN_IN_A_JPEG = ("cut", "zeros to the end", "text")
SEEN_IN_A_PNG = (*SEEN_IN_A_JPEG, "a foreign block", "one bit", "bytes put in")


def damage(path, turn, rng):
    kinds = SEEN_IN_A_JPEG if path.suffix == ".jpg" else SEEN_IN_A_PNG
    content = path.read_bytes()
    changed = damaged(content, kinds[turn % len(kinds)], rng)
    path.write_bytes(changed if changed != content else b"")
