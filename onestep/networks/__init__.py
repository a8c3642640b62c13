"""The EDM networks as diffusers models, and loading what `python -m onestep.networks.import_edm` wrote.

Importing this package is also what lets diffusers load such a folder as the ConsistencyModelPipeline that it is.
"""

import json
from pathlib import Path

from diffusers import EDMEulerScheduler

from .dhariwal_unet import DhariwalUNet
from .song_unet import SongUNet
from .unet import EDMUNet

NETWORKS: dict[str, type[EDMUNet]] = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}


def load_edm(folder: str | Path) -> tuple[EDMUNet, EDMEulerScheduler]:
    """(network, scheduler) of a folder, the network in evaluation mode and float32.

    Raises ValueError where a file is missing or damaged, or where weights and configuration do not match.
    """
    try:
        name = json.loads((Path(folder) / "unet/config.json").read_text(encoding="utf-8"))["_class_name"]
        network, info = NETWORKS[name].from_pretrained(
            folder, subfolder="unet", output_loading_info=True, local_files_only=True
        )
        scheduler = EDMEulerScheduler.from_pretrained(folder, subfolder="scheduler", local_files_only=True)
    except Exception as error:  # diffusers and safetensors raise many kinds
        raise ValueError(
            f"{folder} cannot be loaded ({type(error).__name__}: {error}); allowed is a folder that "
            "python -m onestep.networks.import_edm FILE.pkl FOLDER has written"
        ) from error
    wrong = {kind: keys for kind, keys in info.items() if keys}
    if wrong:
        raise ValueError(f"the weights in {folder} are not those of its configuration: {wrong}; import it again")
    return network.eval(), scheduler
