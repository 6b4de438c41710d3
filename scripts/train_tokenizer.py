"""Learn a small vocabulary from the captions of a dataset.

python scripts/train_tokenizer.py --captions data/emoji64/captions.json --out models/ldm/emoji64/tokenizer.json
"""

from __future__ import annotations

import argparse
import sys

from ldm.cli.arguments import count
from ldm.cli.parser import Parser, command
from ldm.io.errors import blame


def run(args: argparse.Namespace) -> None:
    from ldm.io.files import atomic_write, read_json
    from ldm.modules.encoders.tokenizer import train_tokenizer

    with blame("--captions", (OSError, ValueError, KeyError)):
        annotations = read_json(args.captions)["annotations"]
        tokenizer = train_tokenizer((a["caption"] for a in annotations), args.vocab_size, args.max_length)
    with blame("--out"), atomic_write(args.out) as temporary:
        tokenizer.save(str(temporary))
    print(f"{args.out}: {tokenizer.get_vocab_size()} entries")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", required=True, help="captions in the COCO format")
    parser.add_argument("--out", required=True, help="tokenizer file to write (.json)")
    parser.add_argument("--vocab-size", type=count, default=2048, help="most entries (default: %(default)s)")
    parser.add_argument("--max-length", type=count, default=16, help="tokens per caption (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    return command("train_tokenizer.py", lambda: run(arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())
