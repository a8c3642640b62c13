"""Fashion-MNIST (Zalando, MIT licence) from a Debian package, a folder or the hub."""

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

CLASSES = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
FOLDERS = ("/usr/share/datasets/fashion-mnist", "data/fashion-mnist")
HUB = "zalando-datasets/fashion_mnist"


def load(folder: str | None, split: str) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 32, 32) uint8, padded with black from 28x28, and labels (N,) int64 of `split`: "train" or "test".

    Looks in `folder`, then where Debian's dataset-fashion-mnist lies, then on the Hugging Face hub (needs pyarrow).
    """
    prefix = {"train": "train", "test": "t10k"}[split]
    for candidate in (folder,) if folder else FOLDERS:
        path = Path(candidate) / f"{prefix}-images-idx3-ubyte.gz"
        if path.is_file():
            images = np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=16).reshape(-1, 28, 28)
            labels_path = path.with_name(f"{prefix}-labels-idx1-ubyte.gz")
            labels = np.frombuffer(gzip.decompress(labels_path.read_bytes()), np.uint8, offset=8)
            return _pad(images), torch.from_numpy(labels.astype(np.int64))
    if folder:
        raise ValueError(
            f"no {prefix}-images-idx3-ubyte.gz in {folder}; pass the folder that holds Fashion-MNIST's four .gz files, "
            "or leave --data out after `apt-get install dataset-fashion-mnist`"
        )
    return _from_hub(split)


def _from_hub(split: str) -> tuple[Tensor, Tensor]:
    import io

    try:
        import pyarrow.parquet as parquet
        from huggingface_hub import hf_hub_download
        from PIL import Image

        path = hf_hub_download(HUB, f"fashion_mnist/{split}-00000-of-00001.parquet", repo_type="dataset")
    except Exception as error:
        raise ValueError(
            f"Fashion-MNIST was found neither in {' nor in '.join(FOLDERS)} nor on the hub ({HUB}: {error}); "
            "type `apt-get install dataset-fashion-mnist` or pass --data FOLDER"
        ) from error
    table = parquet.read_table(path).to_pydict()
    images = np.stack([np.asarray(Image.open(io.BytesIO(row["bytes"]))) for row in table["image"]])
    return _pad(images), torch.tensor(table["label"])


def _pad(images: np.ndarray) -> Tensor:
    return torch.from_numpy(np.pad(images, ((0, 0), (2, 2), (2, 2)))[:, None])
