"""The image that is expected on the way."""

from __future__ import annotations

import torch

from evaluation.plots.images import draw_expected
from ldm.io.images import psnr


@torch.no_grad()
def test_from_pure_noise_it_is_what_the_first_prediction_leaves(experiment):
    engine = experiment.engine("ddim", 3)
    model, rule, x = engine.plain_run(experiment.items)
    first = rule.nodes[0]
    (prediction,) = model.decode([model.encode(x, first.t)], [first.t])
    clean = (x - (1 - first.abar) ** 0.5 * model.to_eps(prediction, x, first)) / first.abar**0.5
    expected = psnr(experiment.decode(engine, clean), experiment.images(engine))
    drawn = draw_expected(experiment, steps=3).values["psnr"]
    assert [*drawn] == ["step 0", "step 1", "step 2"]
    torch.testing.assert_close(drawn["step 0"]["images"], expected, rtol=1e-3, atol=1e-3)
