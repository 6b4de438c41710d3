"""CLIP-score: how well images fit their prompts.

The score has several variants. cos is the cosine of the CLIP embeddings of an image and its prompt.
hessel-b32: 2.5 max(cos, 0) with the prefix "A photo depicts" and ViT-B/32 (arXiv 2104.08718); the paper reports it.
cos100-l14, cos100-g14: 100 cos with ViT-L/14 of OpenAI or ViT-g/14 of LAION.
hessel, cos100: the same formulas with any CLIP model, or with --weights models/rdm/emoji-encoder, which knows emoji.
"""

from __future__ import annotations

import sys

from evaluation.metrics.command import RECIPES, VARIANTS, MeasureParser


def parser() -> MeasureParser:
    p = MeasureParser("clip_score.py", __doc__, "clip_score")
    p.add("samples", "--prompts")
    p.add_argument("--variant", choices=VARIANTS, default=VARIANTS[0], help="the formula and the CLIP model, see above")
    weights = "folder of the CLIP model, of transformers or open_clip"
    p.add_argument("--weights", metavar="DIR", required=True, help=weights)
    p.add_argument("--vocabulary", metavar="PATH", help="CLIP's vocabulary (default: in the folder, or installed)")
    p.add_argument("--resize", choices=RECIPES, default="clip-crop", help="how images are resized for the model")
    p.add("--batch-size", "--device", "--out")
    return p


main = parser().main

if __name__ == "__main__":
    sys.exit(main())
