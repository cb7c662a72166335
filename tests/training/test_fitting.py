"""What is refused before the first step."""

from types import SimpleNamespace

import pytest

from transkd.errors import UserError
from transkd.training.fitting import fit


def test_each_process_needs_an_image():
    data = SimpleNamespace(dataset={"train": [0, 1, 2], "val": [0, 1]}.get)
    with pytest.raises(UserError, match=r"the split val has 2 images for 3 processes, .* lower trainer\.devices"):
        fit(SimpleNamespace(world_size=3), None, data)
