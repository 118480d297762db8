"""Where published weights are, their sha256, and what is said when they are missing or wrong."""

import hashlib
import os
from pathlib import Path

FOLDER = Path(__file__).parent / "weights"
# Of the Hub, for weights too large for the package; whoever answers there, weights/SHA256SUMS decides what is loaded.
ORGANISATION = os.environ.get("SSLPP_HUB_ORG", "sslpp")


class WeightsError(RuntimeError):
    """Weights are damaged, or do not fit the network that was asked for."""


def packaged(name: str) -> Path:
    """Where the package has the weights of an ARCH.TAG; without such a file they are on the Hub."""
    return FOLDER / f"{name}.safetensors"


def source(name: str) -> dict[str, str]:
    """Where the weights of an ARCH.TAG are, as a field of timm's PretrainedCfg: ``file``, or ``hf_hub_id``."""
    path = packaged(name)
    return {"file": str(path)} if path.exists() else {"hf_hub_id": f"{ORGANISATION}/{name}"}


def published(name: str) -> str:
    """The sha256 of the weights of an ARCH.TAG.

    Raises:
        WeightsError: none was recorded.
    """
    for line in (FOLDER / "SHA256SUMS").read_text(encoding="utf-8").splitlines():
        sha256, file = line.split()
        if file == f"{name}.safetensors":
            return sha256
    raise WeightsError(f"{FOLDER / 'SHA256SUMS'} has no line for {name}; install sslpp-models again.")


def fetch(name: str, cache_dir: str | Path | None = None) -> Path:
    """The file with the weights of an ARCH.TAG, from the package or the Hub, its sha256 checked.

    The Hub's client itself compares sizes alone, and hands out a cached file as it finds it.

    Args:
        name: ARCH.TAG.
        cache_dir: of the Hub's client.

    Raises:
        WeightsError: the file cannot be had, or is not the one that was published.
    """
    expected, path, remedy = published(name), packaged(name), "install sslpp-models again"
    if not path.exists():
        from huggingface_hub import hf_hub_download

        repository = f"{ORGANISATION}/{name}"
        try:
            path = Path(hf_hub_download(repository, "model.safetensors", cache_dir=cache_dir))
        except Exception as error:  # the client's own, of its transport, of the disk
            raise WeightsError(
                f"{name} is not in the package, and {repository} could not be fetched from the Hub: {error}"
            ) from error
        remedy = f"delete {path.resolve()} and load again"
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise WeightsError(
            f"{path} is not what was published as {name}: its sha256 is {found}, not {expected}. Nothing was "
            f"loaded; {remedy}."
        )
    return path
