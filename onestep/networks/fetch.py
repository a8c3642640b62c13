"""Published EDM networks as folders in the cache: downloaded where they are not here yet, and imported once."""

from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import FileLock

from ..files import sha256_of
from .import_edm import import_edm


def imported(source: str, cache: Path) -> Path:
    """The diffusers folder of a pickle, an address (https://...) or a local file; made in `cache` where it is not there.

    A local file is known by its content, an address by its last part. Several processes may ask at a time. Raises
    ValueError where the pickle cannot be downloaded or imported, and where `cache` cannot be written.
    """
    remote = source.startswith("https://")
    name = Path(source).stem if remote else f"{Path(source).stem}-{sha256_of(source)[:16]}"
    folder = cache / "teachers" / name
    if _whole(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{name}.lock")):
            if not _whole(folder):  # another process may have been first
                with TemporaryDirectory(dir=folder.parent, prefix=".download-") as scratch:
                    import_edm(_downloaded(source, Path(scratch)) if remote else Path(source), folder)
    except OSError as error:
        raise ValueError(
            f"the cache {cache} cannot be written: {error.strerror or error}; set $ONESTEP_CACHE to a writable folder"
        ) from error
    return folder


def _whole(folder: Path) -> bool:
    """Whether an import is there; one takes its name at the end, so that it is whole."""
    return (folder / "model_index.json").is_file()


def _downloaded(url: str, folder: Path) -> Path:
    """The file behind `url`, in `folder`."""
    from torch.hub import download_url_to_file

    path = folder / Path(url).name
    try:
        download_url_to_file(url, str(path))
    except (OSError, HTTPException) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{url} could not be downloaded ({reason}); download it elsewhere, "
            f"type python -m onestep.networks.import_edm {path.name} FOLDER, and then --teacher FOLDER"
        ) from error
    return path
