"""Export a trained model to other libraries.

python -m mrl.export hub --run runs/digits_mrl --out exports/digits_mrl --license mit
python -m mrl.export hub --run runs/digits_mrl --out exports/digits_mrl --license mit --push OWNER/NAME
python -m mrl.export timm --run runs/digits_mrl --out exports/backbone.safetensors
python -m mrl.export sentence_transformers --run runs/digits_mrl --out exports/digits_st
python -m mrl.export onnx --run runs/digits_mrl --out exports/digits_64.onnx --dim 64
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mrl.errors import UserError
from mrl.interop import hub, onnx, timm


def export(args: argparse.Namespace) -> None:
    """Write one export and print how to load it."""
    suffix = {"timm": ".safetensors", "onnx": ".onnx"}.get(args.target, "")
    if suffix and not (args.out.endswith(suffix) and Path(args.out).resolve().parent.is_dir()):
        raise UserError(f"--out is {args.out!r}; allowed: a file that ends in {suffix}, in a folder that exists")
    if args.target == "hub":
        folder = hub.export_folder(args.run, args.out, args.license, args.results)
        print(f'{folder}: load it with mrl.load("{folder}")')
        if args.push:
            print(f"pushed: {hub.push_to_hub(folder, args.push, args.private)}")
    elif args.target == "timm":
        print(f"load it with {timm.export_backbone(args.run, args.out)}")
    elif args.target == "sentence_transformers":
        from mrl.interop.sentence_transformers import export_sentence_transformer  # slow to import

        print(f"load it with {export_sentence_transformer(args.run, args.out, args.dim)}")
    else:
        dim, px = onnx.export_onnx(args.run, args.out, args.dim)
        print(f"{args.out}: images (B, 3, {px}, {px}) -> embedding (B, {dim}), length 1")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mrl.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    targets = parser.add_subparsers(dest="target", required=True, metavar="TARGET")

    def add(name: str, help: str, out: str) -> argparse.ArgumentParser:
        target = targets.add_parser(name, help=help, description=help, allow_abbrev=False)
        target.add_argument("--run", required=True, metavar="RUN", help="a run directory of train.py")
        target.add_argument("--out", required=True, metavar=out, help="where the export goes")
        return target

    to_hub = add("hub", "weights, model.json and model card for the Hugging Face Hub", "DIR")
    to_hub.add_argument("--license", required=True, help="of the weights, as the Hub spells it: mit, cc-by-nc-4.0, ...")
    to_hub.add_argument("--results", metavar="JSONL", help="rows of eval.py; default: the run's last validation")
    to_hub.add_argument("--push", metavar="OWNER/NAME", help="upload to this repository; needs a login (hf auth login)")
    to_hub.add_argument("--private", action="store_true", help="if --push creates the repository, make it private")
    add("timm", "the backbone as a weights file of timm's own model", "FILE.safetensors")
    to_st = add("sentence_transformers", "a folder for SentenceTransformer, which takes images", "DIR")
    to_st.add_argument("--dim", type=int, help="fix the size, as unit vectors; default: left to truncate_dim")
    to_onnx = add("onnx", "an ONNX file: normalized images in, unit embeddings out", "FILE.onnx")
    to_onnx.add_argument("--dim", type=int, help="prefix size; default: the largest trained size")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Export from a command line; returns the exit status."""
    try:
        export(parse(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
