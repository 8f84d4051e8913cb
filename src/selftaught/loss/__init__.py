"""Per-token objectives, unreduced; divergences; surrogates; the chunked vocabulary head; reductions."""

from selftaught.loss.chunked import Reduced, chunked_loss, masked
from selftaught.loss.divergence import clipped_kl, kl
from selftaught.loss.reduction import LossConfig, sampler_correction, token_weights
from selftaught.loss.surrogate import clipped_surrogate, importance_ratio

__all__ = ["LossConfig", "Reduced", "chunked_loss", "clipped_kl", "clipped_surrogate", "importance_ratio", "kl",
           "masked", "sampler_correction", "token_weights"]
