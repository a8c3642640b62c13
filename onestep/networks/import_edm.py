"""Import a published EDM network (Karras et al. 2022): an edm-*.pkl to a diffusers folder, nothing in it being run.

The folder holds `unet/`, the scheduler `scheduler/` and a model_index.json; `onestep.networks.load_edm` reads it, and so
does diffusers once `onestep.networks` has been imported.

    python -m onestep.networks.import_edm FILE.pkl FOLDER
"""

import inspect
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..cli import Parser
from ..files import fsync
from . import NETWORKS, EDMUNet
from .inert import Record, parts, read, tensor

RENAMED = {"img_resolution": "sample_size", "label_dim": "num_class_embeds"}
"""Published argument to ours; the others keep their names."""
IGNORED = ("label_dropout",)
"""Acts in training alone."""


def import_edm(path: Path, folder: Path) -> Path:
    """Write the averaged network of the pickle `path` to `folder` and return it.

    Raises ValueError where the file is damaged, names anything that such a network does not need, or holds another
    network or other weights than its configuration says, and where `folder` exists and is not empty.
    """
    target = folder.resolve()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{folder} exists and is not empty; name another folder")
    network, sigma_data = network_of(path)
    try:
        _write(network, sigma_data, target)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder} cannot be written: {error}; name a folder that is writable") from error
    return folder


def network_of(path: Path) -> tuple[EDMUNet, float]:
    """(network, sigma_data) of a pickle; raises ValueError as `import_edm` does."""
    pickled = read(path)
    try:
        return _network(pickled)
    except ValueError as error:
        raise ValueError(f"{path} cannot be imported: {error}; name a published edm-*.pkl") from error
    except Exception as error:  # what is in the file may have any form
        raise ValueError(f"{path} is not built as a published edm-*.pkl is ({type(error).__name__}: {error})") from error


def _network(pickled: Any) -> tuple[EDMUNet, float]:
    if not isinstance(pickled, dict) or not isinstance(pickled.get("ema"), Record):
        raise ValueError("it has no network under 'ema'")
    outer = pickled["ema"].meta()
    if outer["class_name"] != "EDMPrecond":
        raise ValueError(f"its preconditioning is {outer['class_name']}, and only EDMPrecond is supported")
    inner = outer["state"]["_modules"]["model"].meta()
    if inner["class_name"] not in NETWORKS:
        raise ValueError(f"its network is a {inner['class_name']}; allowed is {' or '.join(NETWORKS)}")
    kind = NETWORKS[inner["class_name"]]
    network = kind(**_arguments(kind, inner["state"])).eval()
    _fill(network, dict(parts(inner["state"])))
    return network, float(outer["state"]["sigma_data"])


def _arguments(kind: type[EDMUNet], state: dict[str, Any]) -> dict[str, Any]:
    """The network's configuration from the arguments that it was made with."""
    if state["_init_args"]:
        raise ValueError("its network was made with arguments that have no names")
    given = {RENAMED.get(key, key): value for key, value in state["_init_kwargs"].items() if key not in IGNORED}
    unknown = sorted(set(given) - set(inspect.signature(kind).parameters))
    if unknown:
        raise ValueError(f"its network has the unknown options {', '.join(unknown)}")
    for key, value in given.items():
        if not all(isinstance(each, int | float | str) for each in (value if isinstance(value, list | tuple) else [value])):
            raise ValueError(f"its option {key} is neither a number, a text nor a list of these")
    return given | {"num_class_embeds": given.get("num_class_embeds") or None}


@torch.no_grad()
def _fill(network: EDMUNet, found: dict[str, Any]) -> None:
    """Copy every pickled tensor into the network; its resampling filters must be there and be what ours are."""
    saved, ours = network.state_dict(), dict(network.named_parameters()) | dict(network.named_buffers())
    for problem, names in (("lacks", ours.keys() - found.keys()), ("has the unknown", found.keys() - ours.keys())):
        if names:
            shown = ", ".join(sorted(names)[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
            raise ValueError(f"it {problem} {shown}")
    for name, target in ours.items():
        value = tensor(found[name])
        if value.shape != target.shape or value.dtype != target.dtype:
            raise ValueError(
                f"{name} is {value.dtype} of shape {tuple(value.shape)}, not {target.dtype} of shape {tuple(target.shape)}"
            )
        if name in saved:
            target.copy_(value)
        elif not torch.equal(value, target):
            raise ValueError(f"{name} is {value.tolist()}, not the {target.tolist()} of its configuration")


def _write(network: EDMUNet, sigma_data: float, target: Path) -> None:
    """Save beside `target` and take its name at the end, so that a folder of that name is whole."""
    from diffusers import ConsistencyModelPipeline, EDMEulerScheduler

    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=sigma_data)
    scratch = target.with_name(f".{target.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
        ConsistencyModelPipeline(unet=network, scheduler=scheduler).save_pretrained(scratch)
        for each in (each for each in scratch.rglob("*") if each.is_file()):
            fsync(each)
        scratch.rename(target)
        fsync(target.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; bad input is one line on stderr and exit code 2."""
    reader = Parser(
        prog="python -m onestep.networks.import_edm",
        description="Import a published EDM network as a diffusers folder; the pickle is read without being run.",
        allow_abbrev=False,
    )
    reader.add_argument("file", type=Path, metavar="FILE.pkl", help="a published edm-*.pkl")
    reader.add_argument("folder", type=Path, metavar="FOLDER", help="where to; must not exist, or be empty")
    given = reader.parse_args(argv)
    try:
        folder = import_edm(given.file, given.folder)
    except ValueError as error:
        reader.error(str(error))
    config = json.loads((folder / "unet/config.json").read_text(encoding="utf-8"))
    print(f"{config['_class_name']}: {folder}\nThe weights keep their licence; NVIDIA's is CC BY-NC-SA 4.0, non-commercial.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
