"""The ways in which bands are computed, each of them on this machine, for the tests of what is."""

from transkd.layers import bands


def take_way(way: str, monkeypatch) -> None:
    """Compute as a way says: on a CPU or as "of a GPU", and in small bands if "many"."""
    if "GPU" in way:
        monkeypatch.setattr(bands, "products_pay", lambda maps: True)
    if "many" in way:
        monkeypatch.setattr(bands, "AT_ONCE", 1000)
        monkeypatch.setattr(bands, "AT_ONCE_ON_GPU", 3000)
