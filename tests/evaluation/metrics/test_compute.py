"""The measures as functions."""

from __future__ import annotations

import pytest

from evaluation.metrics import clip_score as clip_measure
from evaluation.metrics import command, frechet
from evaluation.metrics.clip_score import VARIANTS
from evaluation.metrics.preference import MODELS
from evaluation.runs.images import ImageFolder
from ldm.io.errors import SettingError


def test_a_measure_is_a_function(sets, lite0, tmp_path):
    """It takes paths, images in memory or opened, and a reference that is loaded once."""
    result = frechet.compute(sets / "plain", sets / "real", extractor=lite0, kid=True)
    assert result.values.keys() == {"fid_real", "kid_real", "kid_real_std"} and result.samples["seeds"] == [7]
    real = frechet.load_reference(sets / "real", lite0)
    opened = frechet.compute(ImageFolder(sets / "plain"), real, extractor=lite0)
    assert opened.values["fid_real"] == result.values["fid_real"]
    suite = frechet.compute(sets / "plain", ImageFolder(sets / "real"), extractor=lite0, suite=True)
    assert suite.values["fid_real"] == pytest.approx(result.values["fid_real"], rel=1e-9)


def test_a_measure_names_the_argument_that_it_can_not_use(sets, lite0, tmp_path):
    real, plain = sets / "real", sets / "plain"
    for why, call in {
        "^samples: nowhere: no such folder": lambda: frechet.compute("nowhere", real, extractor=lite0),
        "^reference: nowhere: no such folder": lambda: frechet.compute(plain, "nowhere", extractor=lite0),
        "^extractor: dinov2: no weights are named": lambda: frechet.compute(plain, real, extractor="dinov2"),
        "^extractor: 'x' is not one of": lambda: frechet.compute(plain, real, extractor="x", suite=True),
        "^device: cuda:77 is not there": lambda: frechet.compute(plain, real, extractor="dinov2", device="cuda:77"),
        "^resize: 'x' is not one of clean": lambda: frechet.compute(plain, real, extractor="clip", resize="x"),
        "^variant: 'x' is not one of hessel-b32": lambda: clip_measure.compute(plain, variant="x", weights="w"),
        "^prompts: 1 prompts for 22 images": lambda: clip_measure.compute(plain, weights="w", prompts=["one"]),
        "^weights: clip: nowhere: no such model": lambda: clip_measure.compute(plain, weights="nowhere"),
    }.items():
        with pytest.raises(SettingError, match=why):
            call()


def test_the_flags_offer_what_there_is():
    """Written twice, so that --help need not wait for PyTorch."""
    assert command.VARIANTS == tuple(VARIANTS) and command.PREFERENCES == tuple(MODELS)
