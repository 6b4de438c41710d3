"""Prompt-to-prompt against recorded runs of the published code, and its laws."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from ldm.models.diffusion.ddim import DDIM
from ldm.models.diffusion.ddpm import DDPM
from ldm.models.diffusion.loop import denoise
from ldm.models.diffusion.propagation.plan import Plan
from ldm.models.diffusion.schedule import ddim_nodes, ddim_timesteps
from ldm.modules.attention import BasicTransformerBlock
from ldm.modules.attention_control import AttentionControl, AttentionMaps
from ldm.modules.encoders.clip_tokenizer import ClipTokenizer
from ldm.sampling import prompt_to_prompt
from ldm.sampling.generate import make_items
from ldm.sampling.prompt_to_prompt import EditSettings, PromptToPrompt, attention_to
from ldm.sampling.word_alignment import EVERY_WORD, refinement, replacement, schedule
from tests.helpers.clip_vocabulary import write_vocabulary
from tests.helpers.goldens import assert_golden, from_recipe, load_case

RUNS = ("replace", "refine", "reweight", "refine_reweight", "replace_words", "replace_blend")
LAYERS = {"input_blocks": "down_cross", "middle_block": "mid_cross", "output_blocks": "up_cross"}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return ClipTokenizer(write_vocabulary(tmp_path_factory.mktemp("clip"))).words


def bounds(given) -> dict[str, tuple[float, float]]:
    by_word = given if isinstance(given, dict) else {"default_": given}
    by_word = {"default_": 1.0} | by_word
    by_word[EVERY_WORD] = by_word.pop("default_")
    return {word: tuple(bound) if isinstance(bound, list) else (0.0, bound) for word, bound in by_word.items()}


def edit_settings(setting: dict) -> EditSettings:
    own = setting["self_replace_steps"]
    return EditSettings(
        refine="refine" in setting["controller"],
        cross_steps=bounds(setting["cross_replace_steps"]),
        self_steps=tuple(own) if isinstance(own, list) else (0.0, own),
        weights=setting.get("equalizer", {}),
        blend=tuple(word for one in setting.get("local_blend", ()) for word in one),
        threshold=setting.get("threshold", 0.3),
    )


class Run:
    """A recorded run: its network, and what denoises with its settings."""

    def __init__(self, name: str, words):
        self.case, self.tensors = load_case(f"p2p_{name}")
        config = {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": self.case["unet_kwargs"]}
        self.ddpm = DDPM(config, linear_start=0.00085, linear_end=0.012, use_ema=False, conditioning_key="crossattn")
        from_recipe(self.ddpm.model.diffusion_model, self.case, self.tensors)
        self.words = [words(prompt) for prompt in self.case["prompts"]]
        self.nodes = ddim_nodes(self.ddpm.alphas_cumprod, ddim_timesteps(self.case["steps"]))

    def condition(self, **changes) -> PromptToPrompt:
        return PromptToPrompt(self.words, replace(edit_settings(self.case["setting"]), **changes))

    def __call__(
        self,
        condition: PromptToPrompt | None,
        plan: Plan | None = None,
        maps: AttentionMaps | None = None,
        side: int = 32,
    ):
        """The latents after each step, (S, 2, 4, side, side)."""
        control, edits = None, ()
        if condition is not None:
            items = make_items([{"prompt": prompt} for prompt in self.case["prompts"]], 1, seed=0)
            control, edits = condition.attention(self.ddpm, items, self.nodes)
            control = control if maps is None else replace(control, maps=maps)
        uncond, cond = self.tensors["context"].chunk(2)
        denoiser = self.ddpm.denoiser(cond, uncond, self.case["guidance"], control=control)
        plan = plan or Plan(len(self.nodes), tuple(range(len(self.nodes))))
        x_T = self.tensors["x_T"][..., :side, :side].expand(2, -1, -1, -1)
        return torch.stack([state.x for state in denoise(denoiser, DDIM(self.nodes), plan, x_T, edits)])


@pytest.fixture(scope="module")
def runs(words):
    return {name: Run(name, words) for name in RUNS}


@pytest.mark.parametrize("name", RUNS)
def test_the_recorded_runs(runs, name, monkeypatch):
    run, soft = runs[name], []

    def seen(*arguments):
        soft.append(attention_to(*arguments)[0])
        return soft[-1][None]

    monkeypatch.setattr(prompt_to_prompt, "attention_to", seen)
    layers = {
        layer: f"store.{LAYERS[part]}"
        for part in LAYERS
        for block in getattr(run.ddpm.model.diffusion_model, part).modules()
        if isinstance(block, BasicTransformerBlock)
        for layer in [block.attn2]
    }
    maps = AttentionMaps(layers, largest=1024)
    blends = name == "replace_blend"
    latents = run(run.condition(), maps=None if blends else maps)
    assert_golden(latents, run.tensors["latents"], run.case)
    assert (latents[:, 0] - run.tensors["latents_without_edit"][:, 0]).abs().max() < run.case["tolerance"]["atol"]
    if blends:
        either = torch.stack([(one > run.condition().how.threshold).any(0) for one in soft]).float()
        assert torch.equal(either, run.tensors["blend.masks"])
        torch.testing.assert_close(soft[-1], run.tensors["blend.soft_last"], rtol=1e-3, atol=1e-3)
        return
    counts: dict[str, int] = {}
    for kept, place in zip(maps.kept.values(), layers.values(), strict=True):
        shown = torch.stack([*kept.values()]).sum((0, 2))  # (B, L)
        recorded = run.tensors[f"{place}.{counts.get(place, 0)}.pixel_sum"].unflatten(0, (2, -1)).mean(1)
        torch.testing.assert_close(shown, recorded, rtol=1e-3, atol=1e-2)
        counts[place] = counts.get(place, 0) + 1


def test_the_recorded_tables(words):
    case, tensors = load_case("p2p_word_alignment")
    for i, pair in enumerate(case["pairs"]):
        source, target = words(pair["source"]), words(pair["target"])
        for ours, side in ((source, "source"), (target, "target")):
            assert [*ours.ids] == pair[f"{side}_ids"]
            assert [[*one] for one in ours.positions] == [*pair[f"word_tokens_{side}"].values()]
        if pair["kind"] == "replace":
            assert_golden(replacement(source, target), tensors[f"{i}.mapper"].squeeze(0), case)
        else:
            mapper, old = refinement(source, target)
            assert torch.equal(mapper, tensors[f"{i}.mapper"].squeeze(0))
            assert torch.equal(old, tensors[f"{i}.alphas"].squeeze(0))


def test_the_recorded_schedules(words):
    case, tensors = load_case("p2p_cross_replace_schedule")
    for i, one in enumerate(case["cases"]):
        taken = schedule(words(one["prompts"][1]), bounds(one["cross_replace_steps"]), one["steps"])
        assert torch.equal(taken, tensors[f"{i}.alpha"])


# The two laws, and what an edit leaves alone


@pytest.mark.parametrize("name", ["refine_reweight", "replace_blend"])
def test_the_laws(runs, name):
    """Every node a key node is the plain run (the recorded ones); parallel is serial; the source stays as it is."""
    run, serial, parallel = runs[name], Plan(5, (0, 2)), Plan(5, (0, 2), parallel=3)
    edited = run(run.condition(), serial, side=16)
    torch.testing.assert_close(run(run.condition(), parallel, side=16), edited, rtol=1e-4, atol=1e-3)
    alone = run(None, serial, side=16)
    torch.testing.assert_close(edited[:, 0], alone[:, 0], rtol=1e-4, atol=1e-3)
    assert (edited[-1, 1] - alone[-1, 1]).abs().max() > 0.1


def test_without_any_step_nothing_is_taken(runs):
    run = runs["replace"]
    none = run(run.condition(cross_steps={EVERY_WORD: (0.0, 0.0)}, self_steps=(0.0, 0.0)), side=16)
    torch.testing.assert_close(none, run(None, side=16), rtol=1e-4, atol=1e-3)


def test_groups_of_a_batch_do_not_see_each_other():
    """Two groups at once are each what they are alone."""
    torch.manual_seed(1)
    control = AttentionControl(torch.rand(3, 2, 5, 5), torch.rand(3, 2, 5), range(1), {9.0: 0, 8.0: 2}, groups=2)
    maps = torch.rand(2 * (6 + 6), 4, 7, 5).softmax(-1)  # two steps of [uncond | cond], two groups of three
    layer, both = torch.nn.Identity(), control.at([8.0, 9.0])
    edited = both.edited(layer, maps.clone(), cross=True).unflatten(0, (2, 2, 2, 3))
    kept = maps.unflatten(0, (2, 2, 2, 3))
    assert torch.equal(edited[:, 0], kept[:, 0]) and torch.equal(edited[:, 1, :, 0], kept[:, 1, :, 0])
    one = partial(replace, control, groups=1)
    for group in (0, 1):
        for copy, t in enumerate((8.0, 9.0)):
            alone = one().at([t]).edited(layer, kept[copy, 1, group].clone(), cross=True)
            torch.testing.assert_close(edited[copy, 1, group], alone)
