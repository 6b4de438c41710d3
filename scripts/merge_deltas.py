"""Merge several deltas of Custom Diffusion into one, in the published closed form.

    python scripts/merge_deltas.py giraffe.bin anchor.bin --prompts "a <new1> horse" "a <new2> hook" \\
        --captions captions.txt --out both.bin
    python scripts/txt2img.py --prompt "a <new2> hook" --delta both.bin

Of several --delta files txt2img.py adds up the changes, and each also changes what the others have learned. The merged
file makes of each prompt's words the keys and values that its own delta makes, and changes as little as it can of those
of the captions (arXiv 2212.04488).
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

from ldm.cli.arguments import EMOJI64, model_arguments
from ldm.cli.parser import Parser, check_output, cli, run_command, settings_from
from ldm.io.errors import BadInput, fault_of


def parser() -> Parser:
    p = Parser(prog="merge_deltas.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("deltas", nargs="+", metavar="FILE", help="deltas of keys and values, of diffusers or CompVis")
    p.add_argument(
        "--prompts",
        nargs="+",
        required=True,
        metavar="TEXT",
        help="one for each file, with its new word; files of CompVis do not name theirs, which are <new1>, <new2>, ... "
        "in the order of the files",
    )
    p.add_argument(
        "--captions",
        required=True,
        metavar="FILE",
        help="text file, one caption per line, of what the model is to go on drawing as it does; about a thousand",
    )
    p.add_argument("--out", required=True, metavar="FILE", help="file to write: .bin (diffusers) or .ckpt (CompVis)")
    model_arguments(p, EMOJI64)
    return p


def run(args: argparse.Namespace) -> None:
    from ldm.checkpoint.delta import save_delta
    from ldm.checkpoint.file import CheckpointError
    from ldm.checkpoint.merge import merge_deltas

    check_output(args.out)
    captions = cli.tasks.prompts_in(args.captions, "captions")
    model = cli.setup.make_setup(settings_from(args, cli.settings.ModelSettings), EMOJI64).load()
    try:
        merged = merge_deltas(model, args.deltas, args.prompts, captions)
    except (CheckpointError, OSError) as error:
        raise BadInput(str(error)) from error
    if merged.kept < merged.width:
        print(
            f"--captions: {merged.kept} tokens, fewer than the {merged.width} numbers of a feature: what they leave "
            "open changes as little as it can"
        )
    unet = {name: weight for name, weight in model.model.diffusion_model.state_dict().items() if ".attn2." not in name}
    with fault_of("out"):
        save_delta(args.out, unet | merged.weights, merged.tokens)
    print(f"{args.out}: {', '.join(merged.tokens)}, {len(merged.weights)} layers")
    print(f"outputs for the prompts differ from those of each delta alone by {merged.deviation:.1e} of their norm")


main = partial(run_command, parser(), run)

if __name__ == "__main__":
    sys.exit(main())
