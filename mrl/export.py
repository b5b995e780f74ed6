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

from mrl import distributed
from mrl.config import expand_home
from mrl.errors import UserError
from mrl.interop import hub, onnx, timm

TARGETS = {
    "hub": "a folder with weights, model.json and model card, for the Hugging Face Hub",
    "timm": "the backbone as a .safetensors file for timm.create_model",
    "sentence_transformers": "a folder for SentenceTransformer, which takes images",
    "onnx": "an .onnx file: normalized images in, unit embeddings out",
}


def export(args: argparse.Namespace) -> None:
    """Write one export and print how to load it."""
    suffix = {"timm": ".safetensors", "onnx": ".onnx"}.get(args.target, "")
    if not args.out.endswith(suffix):
        raise UserError(f"--out is {args.out!r}; allowed: a file that ends in {suffix}")
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    if args.target == "hub":
        folder = hub.export_folder(args.run, args.out, args.license, args.results)
        print(f'{folder}: load it with mrl.load("{folder}")')
        if args.push:
            print(f"pushed: {hub.push_to_hub(folder, args.push, args.private)}")
    elif args.target == "timm":
        print(f"load it with {timm.export_backbone(args.run, args.out)}")
    elif args.target == "sentence_transformers":
        from mrl.interop.sentence_transformers import export_sentence_transformer  # an extra, and slow to import

        print(f"load it with {export_sentence_transformer(args.run, args.out, args.dim)}")
    else:
        dim, px = onnx.export_onnx(args.run, args.out, args.dim)
        print(f"{args.out}: images (B, 3, {px}, {px}) -> embedding (B, {dim}), length 1")


def main(argv: Sequence[str] | None = None) -> int:
    """Export from a command line; returns the exit status."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m mrl.export", description=__doc__, formatter_class=form)
    targets = parser.add_subparsers(dest="target", required=True, metavar="TARGET")
    add = {name: targets.add_parser(name, help=text, description=text).add_argument for name, text in TARGETS.items()}
    for target in TARGETS:
        add[target]("--run", required=True, help="a run directory or, except for hub, a folder exported for the Hub")
        add[target]("--out", required=True, help="where the export goes")
    add["hub"]("--license", required=True, help="of the weights, as the Hub spells it: mit, cc-by-nc-4.0, ...")
    add["hub"]("--results", metavar="JSONL", help="rows of eval.py; default: the run's last validation")
    add["hub"]("--push", metavar="OWNER/NAME", help="upload to this repository; needs a login (hf auth login)")
    add["hub"]("--private", action="store_true", help="if --push creates the repository, make it private")
    add["onnx"]("--dim", type=int, help="length of the vectors; default: the largest trained dim")
    length = "length of the vectors, which are then normalized; default: left to truncate_dim"
    add["sentence_transformers"]("--dim", type=int, help=length)
    return distributed.run(lambda: export(parser.parse_args(expand_home(argv))), "stopped")


if __name__ == "__main__":
    sys.exit(main())
