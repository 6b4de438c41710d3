"""Argument groups that the sampling scripts share, each with the defaults of the script that asks for it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ldm.cli.parser import (
    LARGEST_SIDE,
    MOST,
    SMALLEST_TILE,
    count,
    finite,
    interval,
    number,
    parallel,
    scale_value,
    side,
    step_count,
    thresholds,
    timesteps,
    two,
    weighted_file,
    whole,
)
from ldm.io.files import PROJECT_ROOT
from ldm.models.diffusion.propagation.plan import POLYNOMIALS

Files = tuple[Path, Path]  # a model's config and weights

ROOT = PROJECT_ROOT
EMOJI64: Files = (ROOT / "models/ldm/emoji64/config.yaml", ROOT / "models/ldm/emoji64/model.safetensors")
RDM_EMOJI: Files = (ROOT / "models/rdm/emoji/config.yaml", ROOT / "models/rdm/emoji/model.safetensors")
DIT_EMOJI: Files = (ROOT / "models/dit/emoji128/config.yaml", ROOT / "models/dit/emoji128/model.safetensors")
EMOJI64_EDGES = ROOT / "models/control/emoji64-edges/model.safetensors"  # its control network
PROMPT, SHOWN = "a red heart, noto style", 8
NOISE_WEIGHT = 0.003
IMAGENET = 1000  # classes; where a model has one more, that one is their absence
CLASS_NAMES = ROOT / "models/ldm/cin256-v2/classes.txt"  # of ImageNet
NOISE_ORDERS = ("before", "after", "update")
# The names of ldm.models.diffusion.solvers.registry.SOLVERS, which needs PyTorch; --help must answer at once.
SAMPLERS = (
    "ddim, plms, ddpm, ddpm-learned, dpm-solver, dpm-solver++, dpm-solver++2s, dpm-solver-3s, dpm-solver++3m, "
    "dpm-solver-published, dpm-solver++-published, dpm-solver++3m-published, euler, euler-trailing, euler-a, heun, "
    "dpm++2m-karras, unipc"
)
SPACINGS = ("time", "logsnr", "karras", "quad")  # of ldm.models.diffusion.schedule
# The solvers whose default it is; that of all others is time.
USUAL_SPACINGS = {
    "quad": ("dpm-solver", "dpm-solver++", "dpm-solver++3m", "unipc"),
    "logsnr": ("dpm-solver++2s", "dpm-solver-3s"),
    "karras": ("dpm++2m-karras",),
    "trailing": ("euler-trailing",),
}


def text_arguments(
    p: argparse.ArgumentParser, reading: bool = True, framed: bool = True, batch: int = 4
) -> argparse._ArgumentGroup:
    """Prompts, and how many images of each; `reading`: with `prompt_arguments`."""
    what = p.add_argument_group("what to make")
    text = what.add_mutually_exclusive_group()
    text.add_argument(
        "--prompt",
        help=f"text that describes the images (default: {PROMPT}; with --compare the first {SHOWN} lines of "
        f"prompts.txt in the folder of the model's weights, if that file exists)",
    )
    text.add_argument("--from-file", metavar="FILE", help="text file with one prompt per line")
    if reading:
        prompt_arguments(what, framed)
    what.add_argument("--repeat", type=count, default=1, metavar="N", help="use each prompt N times")
    what.add_argument(
        "--n_samples",
        dest="batch_size",
        type=count,
        default=batch,
        metavar="N",
        help="batch size: images of --prompt, or lines of --from-file, at a time (default: %(default)s)",
    )
    what.add_argument(
        "--n_iter",
        type=count,
        default=1,
        metavar="N",
        help="batches of --prompt, or images of each line of --from-file (default: %(default)s)",
    )
    noise_arguments(what)
    what.add_argument(
        "--fixed_code", action="store_true", help="start every prompt and every iteration from the same noise"
    )
    return what


def negative_argument(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--negative_prompt",
        default="",
        metavar="PROMPT",
        help="what the images must not show; guidance leads away from it (default: the empty text)",
    )


def start_image_arguments(p: argparse.ArgumentParser, strength: float, framed: bool = True) -> None:
    """Prompts, the image to start from, how much of it is changed, and the size of the results."""
    what = text_arguments(p, framed=framed)
    what.add_argument(
        "--init-img", required=True, metavar="FILE", help="the image to start from; transparent parts become white"
    )
    strength_argument(what, strength)
    size_arguments(
        what, "the image's, rounded down to what the model can make; the image is scaled to cover that size and cropped"
    )


def strength_argument(group: argparse._ActionsContainer, default: float | None) -> None:
    group.add_argument(
        "--strength",
        type=number(float, sys.float_info.min, 1, "a number above 0, up to 1"),
        default=default,
        help="how much of the image is changed: the share of the steps that is run. A plan counts only these steps "
        "(default: %(default)s)",
    )


def noise_level_argument(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--noise_level",
        type=number(int, 0, sys.maxsize, "a whole number >= 0"),
        metavar="N",
        help="for the x4 upscaler: how much noise is added to the small image, as a timestep of its schedule; with "
        "more noise the model invents more detail (default: see above)",
    )


def uncond_class_argument(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--uncond_class",
        type=number(int, 0, sys.maxsize, "a whole number >= 0"),
        metavar="CLASS",
        help=f"class that means no class; guidance needs it (default: {IMAGENET} for a model with "
        f"{IMAGENET + 1} classes)",
    )


def size_arguments(group: argparse._ArgumentGroup, default: str = "the model's") -> None:
    group.add_argument("--H", "--height", type=side, help=f"height in pixels (default: {default})")
    group.add_argument("--W", "--width", type=side, help=f"width in pixels (default: {default})")


def prompt_arguments(group: argparse._ActionsContainer, framed: bool = True) -> None:
    """What is given beside the prompts, and how both are read; `framed`: the model may be SDXL."""
    negative_argument(group)
    group.add_argument(
        "--prompt-weights",
        action="store_true",
        help="read weights in prompts: (word:1.3) has the weight 1.3, (word) 1.1, [word] 1/1.1, and \\( is a bracket "
        "(default: brackets are text)",
    )
    group.add_argument(
        "--prompt-chunks",
        type=whole(1, 100),
        default=1,
        metavar="N",
        help="read prompts of up to N times the length that the text encoder takes, by N calls of it; the rest of a "
        "longer prompt is left out (default: %(default)s)",
    )
    if framed:
        framing_arguments(group)
    else:
        group.set_defaults(original_size=None, crop=None)


def framing_arguments(group: argparse._ActionsContainer) -> None:
    """What conditions SDXL beside the text: the size and the crop of an original image."""
    group.add_argument(
        "--original-size",
        type=two(side),
        metavar="HEIGHT,WIDTH",
        help="for SDXL: condition on an original image of this size, in pixels; with a small one the result looks "
        "coarse (default: the result's)",
    )
    group.add_argument(
        "--crop",
        type=two(whole(0, LARGEST_SIDE)),
        metavar="TOP,LEFT",
        help="for SDXL: condition on a crop of the original that begins here, in pixels; with 0,0 things stand in the "
        "middle (default: 0,0)",
    )


def refiner_arguments(group: argparse._ActionsContainer) -> None:
    """The model that runs the last steps."""
    group.add_argument(
        "--refiner",
        metavar="FILE",
        help="for SDXL: the weights of its refiner, which runs the last steps (default: none)",
    )
    group.add_argument("--refiner-config", metavar="YAML", help="its config (default: as for --ckpt)")
    group.add_argument(
        "--refiner-share",
        type=number(float, 0.001, 0.999, "a number in 0.001..0.999"),
        metavar="X",
        help="share of the steps, the last ones, that it runs (default: 0.2)",
    )


def control_arguments(control: argparse._ActionsContainer, required: bool = False) -> None:
    """What the images follow, and by which networks; --image is the one that it is made of."""
    control.add_argument(
        "--control",
        action="append",
        required=required,
        default=None if required else [],
        metavar="KIND",
        help="edges (Canny), scribble (HED) or depth (MiDaS) of --image; or FILE, a control image of the size of the "
        "results, which shows edges, depth or whatever the network was trained with; may be given several times",
    )
    control.add_argument(
        "--control-model",
        action="append",
        default=[],
        metavar="FILE",
        help="the control network of each --control: a file that has it alone or beside its base model, or a folder of "
        "the diffusers library (default: that of emoji64's edges)",
    )
    control.add_argument(
        "--control-weight",
        action="append",
        default=[],
        type=scale_value,
        metavar="X",
        help="how much each control network counts (default: 1)",
    )
    control.add_argument("--hed", metavar="FILE", help="weights of HED, for --control scribble")
    control.add_argument(
        "--midas",
        metavar="FILE",
        help="weights of MiDaS, or of a depth-to-image model that has them, for --control depth",
    )
    control.add_argument(
        "--canny",
        type=thresholds,
        default=(100.0, 200.0),
        metavar="LOW,HIGH",
        help="thresholds of the edges (default: 100,200)",
    )
    control.add_argument(
        "--guess",
        action="store_true",
        help="guess mode, for an empty prompt: control counts less in the outer layers, and not at all in the "
        "unconditional prediction",
    )
    control.add_argument(
        "--control-at",
        choices=("key", "every"),
        default="key",
        help="run control networks at key timesteps, or at every step, where their part of the features is then new "
        "(default: %(default)s)",
    )


def retrieval_arguments(p: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """What a retrieval-augmented model is conditioned on."""
    near = p.add_argument_group("retrieval")
    near.add_argument(
        "--use_neighbors", action="store_true", help="condition on the nearest images of the database, too"
    )
    near.add_argument(
        "--omit_query", action="store_true", help="condition on the neighbours alone, not on the prompt itself"
    )
    near.add_argument(
        "--knn", type=whole(1, MOST), metavar="K", help="number of neighbours (default: the model's, or 10)"
    )
    near.add_argument(
        "--database",
        metavar="DIR",
        help="folder of the database, or its name in data/rdm/retrieval_databases (default: the model's; of a "
        "published one artbench-surrealism)",
    )
    near.add_argument(
        "--searcher",
        metavar="DIR",
        help="search by an index of scripts/train_searcher.py (default: compare with every row, which is exact)",
    )
    near.add_argument(
        "--clip_type",
        metavar="NAME[:FOLDER]",
        help="what embeds prompts and images: ViT-L/14, clip:FOLDER, emoji, efficientnet-lite0; it must be what the "
        "database was made with (default: the model's; of a published one ViT-L/14, its weights in "
        "models/clip/ViT-L-14)",
    )
    return near


def class_names_argument(group: argparse._ArgumentGroup, default: str = "none") -> None:
    group.add_argument(
        "--class-names",
        metavar="FILE",
        help="text file with the names of the classes, one line per class, starting with class 0; commas separate "
        f"synonyms (default: {default})",
    )


def classes_arguments(group: argparse._ArgumentGroup, published: Sequence[str], samples: int) -> None:
    """Classes of ImageNet, or of another model, and how many images of each; the defaults are those of an example."""
    group.add_argument(
        "--classes",
        nargs="+",
        default=[*published],
        metavar="CLASS",
        help=f"numbers or names of classes (default: {' '.join(published)})",
    )
    class_names_argument(group, f"{CLASS_NAMES.relative_to(ROOT)} for models of {IMAGENET} or {IMAGENET + 1} classes")
    count_arguments(group, samples, 4, "images of each class")
    uncond_class_argument(group)


def count_arguments(
    group: argparse._ArgumentGroup, samples: int, batch: int, what: str, flags: Sequence[str] = ("--n_samples",)
) -> None:
    """How many images, at most how many at a time, and the seed of their noise.

    Args:
        samples, batch: the defaults.
        what: images of what, for the help.
        flags: what the published script calls their number.
    """
    group.add_argument(
        *flags, dest="n_samples", type=count, default=samples, metavar="N", help=f"{what} (default: %(default)s)"
    )
    group.add_argument(
        "--batch_size",
        type=count,
        default=batch,
        metavar="N",
        help="images at a time; changes speed, memory, and rounding errors (default: %(default)s)",
    )
    noise_arguments(group)


def noise_arguments(group: argparse._ArgumentGroup) -> None:
    """The seed, and what else an image's noise depends on."""
    seed_argument(
        group,
        "an image's noise depends on the seed, on what the image shows (prompt, class, content of the file) and on "
        "the number of the sample",
    )
    group.add_argument(
        "--seed-by-position",
        action="store_true",
        help="noise depends on the position in the list instead of what the image shows, as in earlier versions",
    )


def seed_argument(
    group: argparse._ArgumentGroup, what: str = "an image's noise depends on the seed and on its position in the list"
) -> None:
    group.add_argument(
        "--seed", type=number(int, 0, 2**32 - 1, "0..2^32-1"), default=42, help=f"{what} (default: %(default)s)"
    )


def sampling_arguments(
    p: argparse.ArgumentParser,
    steps: int | None = 50,
    eta: float | None = 0.0,
    scale: float | None = None,
    guided: bool = True,
    unknown: str = "the model's, or 7.5",
    steps_flags: Sequence[str] = ("--steps", "--ddim_steps", "--num_inference_steps"),
    eta_flags: Sequence[str] = ("--ddim_eta",),
) -> argparse._MutuallyExclusiveGroup:
    """Steps, noise, guidance, solver; returns the group of the flags that name a solver.

    Args:
        steps, eta: their defaults; a solver that has no choice of eta is not held to that.
        scale: default of the guidance scale.
        guided: whether there is guidance at all.
        unknown: what the help calls a default that is None, because it depends on the model.
        steps_flags, eta_flags: what the published script calls them.
    """

    def default(value: float | None) -> str:
        return f"(default: {unknown if value is None else value})"

    how = p.add_argument_group("how to sample")
    sampler = how.add_mutually_exclusive_group()
    sampler.add_argument(
        "--sampler",
        default="ddim",
        help=f"the solver: {SAMPLERS}. dpm-solver++ needs few steps; ddpm and euler-a add fresh noise at every step, "
        "ddpm-learned as much as the network predicts (DiT, DeepFloyd-IF); NAME-published is for published numbers, "
        "with larger errors. See docs/samplers.md (default: %(default)s)",
    )
    for flag, name in (("--plms", "plms"), ("--dpm", "dpm-solver++-published")):
        sampler.add_argument(
            flag,
            action="store_const",
            const=name,
            dest="sampler",
            help=f"the same as --sampler {name}, as in the published script",
        )
    node_arguments(how, steps_flags, steps, default(steps))
    how.add_argument(
        *eta_flags,
        dest="eta",
        type=number(float, 0, 1, "a number in 0..1"),
        metavar="ETA",
        help=f"noise of the ddim sampler: 0 = deterministic, 1 = ancestral sampling {default(eta)}",
    )
    p.set_defaults(default_eta=eta, default_steps=steps)
    if guided:
        guidance_arguments(how, scale, default(scale))
    else:
        p.set_defaults(scale=1.0, guidance_interval=None, guidance_reuse=False)
    return sampler


def node_arguments(group: argparse._ArgumentGroup, steps_flags: Sequence[str], steps: int | None, default: str) -> None:
    """How many steps there are, and where they begin."""
    usual = ", ".join(f"{spacing} for {', '.join(names)}" for spacing, names in USUAL_SPACINGS.items())
    group.add_argument(
        *steps_flags, dest="steps", type=step_count, default=steps, metavar="N", help=f"sampling steps {default}"
    )
    group.add_argument(
        "--timesteps-at",
        type=timesteps,
        metavar="T,T,...",
        help="the training timesteps where the steps begin, in place of --steps and --spacing: such as 981,961,941 "
        "(falling; of 1000 timesteps 999 is the noisiest)",
    )
    group.add_argument(
        "--spacing",
        choices=SPACINGS,
        help="how the steps are spread between noise and image: time = evenly over the timesteps, quad = over their "
        "square root, logsnr = over the logarithm of the signal-to-noise ratio, karras = over sigma's seventh root. "
        "With few steps and far more guidance than the model recommends time is best. "
        f"(default: {usual}, time for the others)",
    )


def guidance_arguments(group: argparse._ArgumentGroup, scale: float | None, default: str) -> None:
    """The guidance scale, and when guidance is computed."""
    group.add_argument(
        "--scale",
        "--guidance_scale",
        type=scale_value,
        default=scale,
        help=f"guidance scale; 1 = no guidance {default}",
    )
    group.add_argument(
        "--guidance-interval",
        type=interval,
        metavar="LOW,HIGH",
        help="use guidance only from key timesteps between these two training timesteps (default: from all)",
    )
    reuse = group.add_mutually_exclusive_group()
    reuse.add_argument(
        "--guidance-reuse",
        action="store_true",
        help="compute guidance at key timesteps only; add the same difference at the timesteps that follow",
    )
    reuse.add_argument(
        "--guidance-forecast",
        dest="guidance_reuse",
        default=False,
        choices=POLYNOMIALS,
        help="like --guidance-reuse, but extrapolate the difference from those at the last one to four key timesteps",
    )


def propagation_arguments(
    p: argparse.ArgumentParser,
    plan: str = "faster-diffusion",
    below: float | None = 500.0,
    order: str | None = "before",
    compare: bool = True,
) -> None:
    """The plan and prior noise injection, with their defaults; `compare`: whether both methods can be run at once.

    below, order: None = as the protocol of an evaluation says.
    """
    fast = p.add_argument_group("encoder propagation")
    plan_arguments(fast, plan)
    fast.add_argument(
        "--tome",
        type=number(float, 0, 0.75, "a number in 0..0.75"),
        default=0.0,
        metavar="R",
        help="token merging (ToMe): merge this share of the tokens for self-attention at the UNet's finest level; the "
        "authors of ToMe use 0.5 (default: 0, none)",
    )
    prior_noise_arguments(fast, below, order)
    if not compare:
        p.set_defaults(compare=False, list_plans=False)
        return
    list_plans_argument(fast)
    fast.add_argument(
        "--compare",
        action="store_true",
        help="make each image without encoder propagation, with --plan, and with the best calibrated plan of the same "
        "cost; save them side by side and print time, MACs and PSNR of each method",
    )


def list_plans_argument(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--list-plans", action="store_true", help="print the named plans and their cost; make no images")


def plan_arguments(group: argparse._ArgumentGroup, plan: str) -> None:
    group.add_argument(
        "--plan",
        default=plan,
        help="the key timesteps, at which the whole UNet runs, and what runs at the others. KEYS: off = every step; "
        "faster-diffusion or another name in configs/plans; uniform:N = every N-th step; pro = with gaps that grow by "
        "one; numbers of steps such as 0,1,2,5 (0 = the first step); FILE.yaml; auto:K = the best K by calibration; "
        "auto:SHARE%% = as many as this share of the MACs allows. At the other steps the decoder runs; with "
        "encoder:KEYS:BLOCKS also so many input blocks; with deepcache:KEYS[:BRANCH] the outermost BRANCH blocks, by "
        "default 1; with skip:KEYS nothing; with tgate:KEYS all but cross-attention, whose outputs are kept, and "
        "without guidance. deepcache:N and skip:N are every N-th step, tgate:M the first M. At the end, +LEVEL:STEPS "
        "sets the level of single steps, LEVEL = full, encoder (the decoder runs), deepcache, skip or tgate: "
        "skip:6+encoder:1-5. online:[time:]X = a key timestep when the latent (with "
        "time: the timestep embedding) has changed by X. See docs/acceleration.md (default: %(default)s)",
    )
    group.add_argument(
        "--forecast",
        "--propagate",
        dest="propagate",
        metavar="NAME[:AXIS][:QUANTITY]",
        help="how the parts that do not run are forecast from key timesteps before. NAME: hold = as at the last one; "
        "linear, quadratic, cubic = the polynomial through the last two, three, four; taylor1 to taylor3 (TaylorSeer); "
        "ab2 to ab4 (AB-Cache); chebyshev, spectrum (Spectrum); zeros = nothing, for comparison. AXIS: timestep, "
        "logsnr or step. QUANTITY, with skip: v, eps or x0. For example quadratic:logsnr:eps (default: as the plan "
        "file says; quadratic:logsnr:eps with skip, but linear:timestep:x0 if noise is added at every step; otherwise "
        "hold)",
    )
    group.add_argument(
        "--error-budget",
        type=number(float, sys.float_info.min, sys.float_info.max, "a number above 0"),
        metavar="X",
        help="largest relative error of a forecast, measured at the next key timestep: where it is larger, the steps "
        "between are computed again with more key timesteps. Makes one image at a time (default: any error)",
    )
    group.add_argument(
        "--parallel",
        type=parallel,
        metavar="N|auto",
        help="largest number of decoder steps in one batch; changes speed, memory, and rounding errors (default: "
        "auto = on a GPU as many as fit into memory, on a CPU as many as save time)",
    )


def prior_noise_arguments(group: argparse._ArgumentGroup, below: float | None, order: str | None) -> None:
    unknown = "the protocol's"
    group.add_argument(
        "--noise-weight",
        type=number(float, 0, 100, "a number in 0..100"),
        metavar="X",
        help=f"weight of prior noise injection; 0 = off (default: {NOISE_WEIGHT}; with --plan off, skip:KEYS or "
        f"tgate:KEYS 0)",
    )
    group.add_argument(
        "--noise-below",
        type=finite,
        default=below,
        metavar="T",
        help=f"inject at training timesteps below T (default: {unknown if below is None else below})",
    )
    group.add_argument(
        "--noise-order",
        choices=NOISE_ORDERS,
        default=order,
        help=f"inject before the prediction, after it, or after the solver's update (default: {order or unknown})",
    )


def adapter_arguments(group: argparse._ArgumentGroup) -> None:
    """Files that change a model that reads text."""
    group.add_argument(
        "--lora",
        type=weighted_file,
        action="append",
        default=[],
        metavar="FILE[:WEIGHT]",
        help="add the changes of a LoRA file to the weights, WEIGHT times (default: 1); of kohya's scripts, peft or "
        "diffusers; may be given several times",
    )
    group.add_argument(
        "--embedding",
        action="append",
        default=[],
        metavar="FILE",
        help="new words for prompts (textual inversion): the name in a diffusers file, else the name of the file; may "
        "be given several times",
    )
    group.add_argument(
        "--delta",
        action="append",
        default=[],
        metavar="FILE",
        help="weights and new words of Custom Diffusion, of diffusers or CompVis; of several files the changes add up; "
        "scripts/merge_deltas.py merges them in closed form",
    )


def model_arguments(
    p: argparse.ArgumentParser, default: Files | None = None, note: str = "no default", adapters: bool = False
) -> argparse._ArgumentGroup:
    """The model's files and where it runs.

    Args:
        default: the model that needs no flag; `note` says if another is.
        adapters: whether files are taken that change the model.
    """
    note = f"default: {default[1].parent.relative_to(ROOT)}" if default else note
    model = p.add_argument_group(f"the model ({note})")
    if adapters:
        adapter_arguments(model)
    else:
        p.set_defaults(lora=(), embedding=(), delta=())
    model.add_argument(
        "--config",
        metavar="YAML",
        help="the model's config; without --ckpt the weights are model.safetensors in the same folder, or those of the "
        "one published model that has this config",
    )
    model.add_argument(
        "--ckpt",
        metavar="FILE",
        help="the weights: .safetensors, .ckpt, or a diffusers folder; without --config the config is config.yaml in "
        "the same folder, or the published config that fits",
    )
    model.add_argument(
        "--weights",
        choices=("auto", "ema", "raw"),
        default="auto",
        help="use the averaged (ema) or the last (raw) weights of the UNet; auto = averaged if there are any",
    )
    model.add_argument(
        "--C", dest="channels", type=count, metavar="N", help="number of latent channels that the config must have"
    )
    model.add_argument(
        "--f", dest="factor", type=count, metavar="N", help="downsampling factor that the config must have"
    )
    model.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    precision = model.add_mutually_exclusive_group()
    precision.add_argument(
        "--precision",
        choices=("full", "autocast"),
        help="float32, or the device's lower precision (default: autocast on cuda, else full)",
    )
    precision.add_argument(
        "--fp16", action="store_const", const="autocast", dest="precision", help="the same as --precision autocast"
    )
    return model


def output_arguments(
    p: argparse.ArgumentParser, outdir: str, flags: Sequence[str] = ("--outdir",), grid: bool = True
) -> argparse._ArgumentGroup:
    """Where images go.

    Args:
        outdir: the default.
        flags: what the published script calls it.
        grid: whether a grid of all images is offered.
    """
    out = p.add_argument_group("output")
    out.add_argument(
        *flags,
        dest="outdir",
        default=outdir,
        metavar="DIR",
        help="folder for samples/, manifest.jsonl, and grids; images that already exist there are not made again "
        "(default: %(default)s)",
    )
    if grid:
        out.add_argument(
            "--n_rows",
            dest="columns",
            type=whole(0, MOST),
            default=0,
            metavar="N",
            help="images in a row of the grid (default: the batch size)",
        )
        out.add_argument(
            "--skip_grid", dest="grid", action="store_false", help="save no grid; needed for very many images"
        )
    else:
        p.set_defaults(grid=False, columns=0)
    out.add_argument("--skip_save", dest="save", action="store_false", help="save no single images")
    tile_argument(out)
    out.add_argument("--again", action="store_true", help="make images again that already exist, to measure their time")
    return out


def tile_argument(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--tile",
        type=whole(SMALLEST_TILE, LARGEST_SIDE),
        metavar="PIXELS",
        help="decode the latents in tiles of so many pixels a side: less memory for large images, more time; changes "
        "rounding errors only (default: whole images)",
    )
