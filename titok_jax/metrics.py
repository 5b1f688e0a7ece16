"""Measures of images and tokens, in numpy and float64 throughout. Imports no model."""

import numpy as np


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each pair of images, -10 log10(mean squared error) for a peak of 1.

    Args:
      a, b: [B, H, W, C] float in [0, 1].

    Returns:
      float64 [B] in dB; infinite for equal images.

    Raises:
      ValueError: shapes that differ, or integers.
    """
    a, b = _pair(a, b)
    with np.errstate(divide="ignore"):
        return -10.0 * np.log10(np.square(a - b).mean((1, 2, 3)))


def ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Structural similarity of each pair of images (Wang et al., "Image Quality Assessment: From Error Visibility to
    Structural Similarity", IEEE TIP 2004, equation 13), with the paper's settings: an 11x11 Gaussian window of sigma 1.5,
    K1 = 0.01, K2 = 0.03, data range 1; mean over the positions where the window lies inside, and over the channels.

    Args:
      a, b: [B, H, W, C] float in [0, 1], at least 11x11 pixels.

    Returns:
      float64 [B], at most 1.

    Raises:
      ValueError: shapes that differ, integers, or images smaller than the window.
    """
    a, b = _pair(a, b)
    if min(a.shape[1:3]) < 11:
        raise ValueError(f"images of {a.shape[1]}x{a.shape[2]} pixels, expected at least 11x11, the window of SSIM")
    taps = np.exp(-0.5 * np.square(np.arange(-5, 6) / 1.5))
    taps /= taps.sum()

    def window(x):  # [B, H, W, C] -> [B, H - 10, W - 10, C]
        for axis in (1, 2):
            x = np.lib.stride_tricks.sliding_window_view(x, 11, axis=axis) @ taps
        return x

    mean_a, mean_b = window(a), window(b)
    var_a, var_b = window(a * a) - mean_a**2, window(b * b) - mean_b**2
    covariance = window(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    similarity /= (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    return similarity.mean((1, 2, 3))


def _pair(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a), np.asarray(b)
    if a.ndim != 4 or a.shape != b.shape:
        raise ValueError(f"images of shapes {list(a.shape)} and {list(b.shape)}, expected [B, H, W, C] twice")
    if a.dtype.kind in "iub" or b.dtype.kind in "iub":
        raise ValueError(f"images of dtypes {a.dtype} and {b.dtype}, expected float in [0, 1]")
    return a.astype(np.float64), b.astype(np.float64)


class CodebookUsage:
    """How evenly a codebook is used, over any number of batches of tokens.

    Attributes:
      counts: int64 [codebook_size], how often each code was seen.
    """

    def __init__(self, codebook_size: int):
        self.counts = np.zeros(codebook_size, np.int64)

    def update(self, tokens: np.ndarray) -> "CodebookUsage":
        """Counts tokens, integers of any shape in 0 .. codebook_size - 1; returns itself.

        Raises:
          ValueError: a token out of range.
        """
        tokens = np.asarray(tokens).reshape(-1)
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < len(self.counts):
            raise ValueError(f"tokens reach from {tokens.min()} to {tokens.max()}, expected 0 to {len(self.counts) - 1}")
        self.counts += np.bincount(tokens, minlength=len(self.counts))
        return self

    @property
    def usage(self) -> float:
        """Fraction of the codes seen at least once."""
        return float(np.mean(self.counts > 0))

    @property
    def entropy(self) -> float:
        """Of the distribution of codes, in bits: 0 for a single code, log2(codebook_size) if all are equally frequent."""
        if not self.counts.any():
            return 0.0
        p = self.counts[self.counts > 0] / self.counts.sum()
        return float(max(0.0, -(p * np.log2(p)).sum()))

    @property
    def perplexity(self) -> float:
        """2 to the entropy: as many equally frequent codes would be as uncertain. 1 .. codebook_size."""
        return 2.0**self.entropy


def nearest_neighbours(
    queries: np.ndarray, references: np.ndarray, k: int = 1, *, block: int = 256
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest references of each query by exhaustive search, nearest first, of equally near ones the first.

    Args:
      queries, references: [Q, D], [R, D], any real dtype.
      k: 1 .. R.
      block: queries at a time; bounds the memory to [block, R] and [block, k, D] float64.

    Returns:
      Euclidean distances float64 [Q, k] and indices into the references int64 [Q, k].

    Raises:
      ValueError: shapes that do not fit, or k out of range.
    """
    queries, references = np.asarray(queries), np.asarray(references)
    if queries.ndim != 2 or references.ndim != 2 or queries.shape[1] != references.shape[1]:
        raise ValueError(f"shapes {list(queries.shape)} and {list(references.shape)}, expected [Q, D] and [R, D]")
    if not 1 <= k <= len(references):
        raise ValueError(f"k is {k}, expected 1 to {len(references)}, the number of references")
    references = references.astype(np.float64)
    norms = np.square(references).sum(1)
    distances, indices = np.empty((len(queries), k)), np.empty((len(queries), k), np.int64)
    for start in range(0, len(queries), block):
        part = queries[start : start + block].astype(np.float64)
        # Without |query|^2, which is the same for all of its references. Exact where the values are integers.
        near = np.argsort(norms - 2.0 * part @ references.T, axis=1, kind="stable")[:, :k]
        # By differences: the expansion above would not give 0 for an exact copy.
        exact = np.sqrt(np.square(part[:, None] - references[near]).sum(-1))
        order = np.argsort(exact, axis=1, kind="stable")
        indices[start : start + block] = np.take_along_axis(near, order, 1)
        distances[start : start + block] = np.take_along_axis(exact, order, 1)
    return distances, indices


def knn_classify(queries: np.ndarray, references: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    """The most frequent label among the k nearest references; of several, the one whose reference is nearest.

    Args:
      queries, references: [Q, D], [R, D], any real dtype.
      labels: int [R], of the references, at least 0.
      k: 1 .. R.

    Returns:
      int64 [Q].

    Raises:
      ValueError: as `nearest_neighbours`, and if there are not as many labels as references.
    """
    labels = np.asarray(labels)
    if labels.shape != (len(references),):
        raise ValueError(f"labels have shape {list(labels.shape)}, expected [{len(references)}], one for each reference")
    votes = labels[nearest_neighbours(queries, references, k)[1]]  # [Q, k], nearest first
    counts = (votes[:, :, None] == votes[:, None, :]).sum(-1)  # [Q, k]: votes for the label of each neighbour
    return votes[np.arange(len(votes)), counts.argmax(1)].astype(np.int64)  # argmax: the first, so the nearest
