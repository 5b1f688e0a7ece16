"""Computes the metrics of an evaluation from its resumable pieces.

One process computes each metric from the pieces in their order and in float64. So the result is the same bit for bit for any
number of processes and after any number of kills. Names show the number of images: "FID" means 50,000 images, as in
published results, and "FID-5K" means 5,000. Metrics with the features of digits are called "digits-FID" and so on.
"""

import numpy as np

from titok_jax.evaluation import metrics
from titok_jax.evaluation.pieces import blocks, gather, statistics
from titok_jax.evaluation.references import Reference
from titok_jax.runtime.shards import Shards

PUBLISHED_NUM = 50_000  # images in published results
ADM_SPLIT = 5_000  # images in a chunk of ADM's Inception score


def metric_name(metric: str, num_images: int) -> str:
    """ "FID" -> "FID" for 50,000 images, as in published results; otherwise "FID-5K", "FID-360"."""
    if num_images == PUBLISHED_NUM:
        return metric
    return f"{metric}-{num_images // 1000}K" if num_images % 1000 == 0 else f"{metric}-{num_images}"


def codebook_figures(shards: Shards, codebook_size: int) -> dict[str, float]:
    """How evenly the tokens use the codebook: codebook_usage (a fraction), perplexity, entropy_bits."""
    usage = metrics.CodebookUsage(codebook_size)
    for tokens in blocks(shards, "tokens"):
        usage.update(tokens)
    return {"codebook_usage": usage.usage, "perplexity": usage.perplexity, "entropy_bits": usage.entropy}


def reconstruction_figures(
    shards: Shards, network: str | None, codebook_size: int | None, prefix: str = ""
) -> dict[str, float]:
    """Computes the metrics of the pieces of `reconstruction_pieces`.

    Args:
      network: name of the feature network; None: no figures of features.
      codebook_size: None for a VAE.
      prefix: prefix for the names of metrics that use features; "" for Inception.

    Returns:
      rFID between the images and their reconstructions, IS of the reconstructions (one split, as in the published evaluation
      of tokenizers), the means of psnr (dB), ssim and lpips, and the codebook metrics. The names rFID and IS carry the
      number of images.
    """
    named = {}
    if network is not None:
        score = metrics.InceptionScore()
        for logits in blocks(shards, "fake_logits"):
            score.update(logits)
        real, fake = (statistics(shards, name, network) for name in ("real_pool", "fake_pool"))
        figures = {"rFID": metrics.frechet_distance(real, fake), "IS": score.value}
        named = {metric_name(prefix + name, shards.length): value for name, value in figures.items()}
    for name in ("psnr", "ssim", "lpips"):
        if name in shards.read(0):
            named[name] = float(gather(shards, name).mean(dtype=np.float64))
    return named | ({} if codebook_size is None else codebook_figures(shards, codebook_size))


def generation_figures(
    shards: Shards, reference: Reference, prefix: str = "", num: int | None = None, *, features: str = ""
) -> dict[str, float]:
    """Compares the first `num` images (default: all) of `generation_pieces` or `image_pieces` with a reference.

    Args:
      prefix: prefix for the names of the metrics; "" for Inception.
      features: prefix of the array names in the pieces: "real_" or "fake_" for `reconstruction_pieces`.

    Returns:
      FID, sFID (if the network has spatial features), IS (ADM's: the mean over consecutive chunks of 5,000), precision and
      recall (k = 3). Names carry the number of images.
    """
    network, num = reference.about["network"], num or shards.length
    pool, score = gather(shards, f"{features}pool", num), metrics.InceptionScore(ADM_SPLIT)
    for logits in blocks(shards, f"{features}logits", num):
        score.update(logits)
    figures = {
        "FID": metrics.frechet_distance(metrics.FeatureStatistics(pool.shape[1], network).update(pool), reference.pool)
    }
    if reference.spatial is not None:
        figures["sFID"] = metrics.frechet_distance(statistics(shards, f"{features}spatial", network, num), reference.spatial)
    figures["IS"] = score.value
    figures["precision"], figures["recall"] = metrics.precision_recall(reference.neighbourhoods, pool)
    return {metric_name(prefix + name, num): value for name, value in figures.items()}
