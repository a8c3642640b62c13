"""Prompt retrieval: is the picture of a prompt nearest to the real pictures of that prompt?"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .diversity import members

PLACES = (1, 10)
"""Places k of retrieval@k."""


def ranks(fake: Tensor, real: Tensor, asked: Sequence[str], captions: Sequence[str]) -> Tensor:
    """Place, from 1, of the nearest real picture whose caption is the prompt of the image, int64 (N,).

    fake (N, D) and real (M, D) are features, which are compared by the cosine of their angle, in float64; `asked` are the
    N prompts, `captions` those of the real pictures. Real pictures that are as near as that one count as behind it. This is
    the R-precision of text-to-image papers (Xu et al. 2018, arXiv 1711.10485, section 5) with real pictures in place of
    texts, so that it needs no model of text. Raises ValueError for unequal numbers, and for a prompt without a real picture.
    """
    if len(fake) != len(asked) or len(real) != len(captions):
        raise ValueError(
            f"{len(fake)} images with {len(asked)} prompts and {len(real)} real ones with {len(captions)}; give one an image"
        )
    own = members(captions)
    if missing := [prompt for prompt in asked if prompt not in own]:
        raise ValueError(f"no real picture has the caption {missing[0]!r}: leave retrieval out of --metrics")
    unit, found = F.normalize(real.double(), dim=1), []
    for image, prompt in zip(fake, asked):
        near = unit @ F.normalize(image.double(), dim=0)
        found.append(1 + int((near > near[own[prompt]].max()).sum()))
    return torch.tensor(found)


def retrieval(places: Tensor) -> dict[str, Tensor]:
    """{"retrieval@k": whether an image's place is at most k, float64 (N,)} for each k of `PLACES`."""
    return {f"retrieval@{k}": (places <= k).double() for k in PLACES}
