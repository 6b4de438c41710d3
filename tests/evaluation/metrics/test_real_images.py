"""The reference images of a protocol."""

from __future__ import annotations

import json

import pytest

from evaluation.protocols.protocol import Protocol
from evaluation.runs.images import ImageError, reference_images
from ldm.io.images import save_png
from tests.helpers.measures import draw


def test_the_reference_images_of_a_protocol_in_a_folder(tmp_path):
    for k in range(5):
        save_png(tmp_path / "real" / f"{k}.png", draw(k), {})
    images = [{"id": 50 - k, "file_name": f"{k}.png", "height": 30 + k % 2} for k in range(5)]
    (tmp_path / "c.json").write_text(json.dumps({"images": images}))
    asks = {"data": {"kind": "captions", "file": "c.json", "pictures": "real"}, "size": 32, "guidance": 1.0}
    assert reference_images(Protocol(**asks), tmp_path) == tmp_path / "real"
    some = Protocol(**asks | {"data": asks["data"] | {"where": {"height": 31}}})
    assert reference_images(some, tmp_path).names == ["1.png", "3.png"]
    (tmp_path / "real" / "3.png").unlink()
    with pytest.raises(ImageError, match="real: 1 images that c.json names are not there, such as 3.png"):
        reference_images(some, tmp_path)
    (tmp_path / "c.json").write_text(json.dumps({"images": [*images, images[0] | {"id": "x"}]}))
    with pytest.raises(ImageError, match=r"c.json: .*images.5.id should be a valid integer; got 'x'"):
        reference_images(some, tmp_path)
