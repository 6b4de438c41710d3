"""Learn a small vocabulary from the captions of a dataset.

python scripts/train_tokenizer.py --captions data/emoji64/captions.json --out models/ldm/emoji64/tokenizer.json
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

from ldm.cli.parser import Parser, count, run_command
from ldm.io.errors import fault_of
from ldm.io.files import atomic_write, read_json


def parser() -> Parser:
    p = Parser(prog="train_tokenizer.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--captions", required=True, metavar="FILE", help="captions in the COCO format")
    p.add_argument("--out", required=True, metavar="FILE", help="tokenizer file to write (.json)")
    p.add_argument(
        "--vocab-size", type=count, default=2048, metavar="N", help="largest number of entries (default: %(default)s)"
    )
    p.add_argument(
        "--max-length", type=count, default=16, metavar="N", help="tokens per caption (default: %(default)s)"
    )
    return p


def run(args: argparse.Namespace) -> None:
    from ldm.modules.encoders.tokenizer import train_tokenizer

    with fault_of("captions", (OSError, ValueError, KeyError)):
        annotations = read_json(args.captions)["annotations"]
        tokenizer = train_tokenizer((a["caption"] for a in annotations), args.vocab_size, args.max_length)
    with fault_of("out"), atomic_write(args.out) as temporary:
        tokenizer.save(str(temporary))
    print(f"{args.out}: {tokenizer.get_vocab_size()} entries")


main = partial(run_command, parser(), run)

if __name__ == "__main__":
    sys.exit(main())
