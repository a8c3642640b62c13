"""High frequencies and edges of pictures, as losses compare them."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

MASKS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "gaussian": lambda k, cutoff: -torch.expm1(-((k / cutoff) ** 2) / 2),
    "hard": lambda k, cutoff: (k >= cutoff).to(k.dtype),
}
"""What a high pass leaves of the frequency k, in cycles a picture: a smooth rise, which does not ring, or all or nothing."""
SOBEL = (-1.0, 0.0, 1.0), (1.0, 2.0, 1.0)


def spectrum(x: Tensor, cutoff: float, mask: str = "gaussian") -> Tensor:
    """M(|k|) F(x), complex, shape (B, C, H, W): F the orthonormal Fourier transform over H and W, k in cycles a picture.

    In float32 at least. By Parseval's theorem its mean |.|^2 is the mean square of `high_pass(x)`.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    rows, columns = (torch.fft.fftfreq(n, 1 / n, device=x.device, dtype=x.dtype) for n in x.shape[-2:])
    k = (rows[:, None] ** 2 + columns**2).sqrt()
    return MASKS[mask](k, cutoff) * torch.fft.fft2(x, norm="ortho")


def high_pass(x: Tensor, cutoff: float, mask: str = "gaussian") -> Tensor:
    """H x = F^-1 M F x, shape of x: self-adjoint, and with the hard mask a projection."""
    return torch.fft.ifft2(spectrum(x, cutoff, mask), norm="ortho").real


def edges(x: Tensor, padding: str = "replicate") -> Tensor:
    """Sobel's derivatives along W and along H, shape (2, B, C, H, W), in float32 at least.

    `padding` is one of F.pad's modes; zeros would draw an edge around the picture.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    slope, smooth = (torch.tensor(each, device=x.device, dtype=x.dtype) for each in SOBEL)
    along_w = smooth[:, None] * slope
    kernels = torch.stack([along_w, along_w.T])[:, None]
    flat = F.pad(x.flatten(0, 1)[:, None], (1, 1, 1, 1), padding)
    return F.conv2d(flat, kernels).transpose(0, 1).unflatten(1, x.shape[:2])


def spectral_distance(x: Tensor, y: Tensor, cutoff: float, mask: str = "gaussian") -> Tensor:
    """mean (H x - H y)^2 over batch and elements."""
    return spectrum(x - y, cutoff, mask).abs().square().mean()


def edge_distance(x: Tensor, y: Tensor, padding: str = "replicate") -> Tensor:
    """mean over batch and elements of the squared difference of both derivatives, summed over the two."""
    return edges(x - y, padding).square().sum(0).mean()
