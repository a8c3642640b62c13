"""Build reference statistics from a folder of real images; killed, the same command goes on.

python eval/reference.py val2014 -o coco2014-val-256 --extractor inception --size 256
python eval/reference.py FOLDER -o STATISTICS --extractor timm:efficientnet_lite0 --keep-features

The folder STATISTICS is what `python -m onestep.evaluate WHAT --reference STATISTICS` takes. Its reference.json has the
extractor with the hash of its weights, the hash of the images, their number, formats and size.
"""

import json
import sys
import warnings
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

from onestep.cli import Parser
from onestep.evaluate import device_of
from onestep.metrics.build_reference import build
from onestep.metrics.extractor import load_extractor


def parse(argv: Sequence[str] | None) -> Namespace:
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="real images, in this folder and those in it")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the folder to write")
    parser.add_argument("--extractor", default="inception", help="default: %(default)s; see docs/extractors.md")
    parser.add_argument("--weights", type=Path, help="the extractor's weights, where they are not in their usual place")
    parser.add_argument("--size", type=int, help="crop to a square and resize all images to this first")
    parser.add_argument("--keep-features", action="store_true", help="for KID, precision and recall: 4 D bytes an image")
    parser.add_argument("--spatial", action="store_true", help="statistics for sFID as well")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=1, help="threads that read and resize images")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; bad input is one line on stderr and exit code 2."""
    args = parse(argv)
    try:
        details = build(
            args.folder,
            args.output,
            load_extractor(args.extractor, args.weights, device_of(args.device)),
            size=args.size,
            keep_features=args.keep_features,
            spatial=args.spatial,
            batch_size=args.batch_size,
            workers=args.workers,
        )
    except ValueError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    print(json.dumps(details, indent=1))
    return 0


if __name__ == "__main__":
    warnings.formatwarning = lambda message, *rest, **more: f"warning: {message}\n"
    sys.exit(main())
