"""Per-token objectives, unreduced; divergences; surrogates; the chunked vocabulary head; reductions."""

from selftaught.loss.chunked import Reduced, chunked_loss, masked
from selftaught.loss.divergence import (
    DIVERGENCES,
    barycenter,
    clipped_kl,
    divergence,
    js,
    kl,
    kl_to_barycenter,
    mixture,
    with_tail,
)
from selftaught.loss.reduction import LossConfig, sampler_correction, token_weights
from selftaught.loss.surrogate import (
    REFERENCE_KLS,
    capped_ratio,
    clip_ratio,
    clipped,
    clipped_loss,
    importance_ratio,
    reference_penalty,
)

__all__ = ["DIVERGENCES", "REFERENCE_KLS", "LossConfig", "Reduced", "barycenter", "capped_ratio", "chunked_loss",
           "clip_ratio", "clipped", "clipped_kl", "clipped_loss", "divergence", "importance_ratio", "js",
           "kl", "kl_to_barycenter", "masked", "mixture", "reference_penalty", "sampler_correction",
           "token_weights", "with_tail"]
