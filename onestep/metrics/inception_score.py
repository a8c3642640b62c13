"""The Inception Score: sharp classes, many of them."""

import math
from itertools import pairwise

import torch
from torch import Tensor


def inception_score(logits: Tensor, splits: int = 10) -> tuple[float, float]:
    """Mean and standard deviation over splits of exp(E_x KL(p(c | x) || p(c))), p(c) being the mean of p(c | x) in a split.

    Salimans et al. 2016, arXiv 1606.03498, section 4. logits: (N, classes), the classifier's, before softmax; split s holds
    the images s N // splits to (s + 1) N // splits - 1, as in the paper's code. 1 is the least and the number of classes the
    most. Images whose order has a meaning, such as class by class, belong shuffled first. The standard deviation is that of
    the population of splits, no error of the mean. float64.

    Raises ValueError for logits that are not finite or not (N, classes), and for fewer images than splits.
    """
    if logits.ndim != 2 or not logits.isfinite().all():
        raise ValueError(f"logits of shape {tuple(logits.shape)}; allowed is (N, classes) with finite values")
    if not 1 <= splits <= len(logits):
        raise ValueError(f"{len(logits)} images do not make {splits} splits; allowed are 1 to {len(logits)}: type fewer")
    log_p = logits.detach().to("cpu", torch.float64).log_softmax(1)
    bounds = [s * len(log_p) // splits for s in range(splits + 1)]
    scores = torch.tensor([_score(log_p[a:b]) for a, b in pairwise(bounds)], dtype=torch.float64)
    return float(scores.mean()), float(scores.std(correction=0))


def _score(log_p: Tensor) -> float:
    # p(c) by logsumexp: as a mean of probabilities it underflows to 0, and 0 * -inf is no number
    log_marginal = log_p.logsumexp(0) - math.log(len(log_p))
    return math.exp(float((log_p.exp() * (log_p - log_marginal)).sum(1).mean()))
