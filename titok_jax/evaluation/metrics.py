"""Metrics of images, image features and tokens, in numpy and float64 throughout. Imports no model.

Metrics over a whole data set are classes. `update(batch)` adds the next batch, and `merge(other)` adds what another process
has counted.
"""

import os
import warnings

import numpy as np

from titok_jax.runtime.npz import NpzFile
from titok_jax.runtime.outputs import new_file

# The Gaussian window of SSIM along one axis: 11 taps of sigma 1.5.
SSIM_TAPS = np.exp(-0.5 * np.square(np.arange(-5, 6) / 1.5))
SSIM_TAPS /= SSIM_TAPS.sum()


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each pair of images, -10 log10(mean squared error) for a peak of 1.

    Args:
      a, b: [B, H, W, C] float in [0, 1].

    Returns:
      float64 [B] in dB; infinite for equal images.

    Raises:
      ValueError: if the shapes differ, or for integers.
    """
    a, b = _pair(a, b)
    with np.errstate(divide="ignore"):
        return -10.0 * np.log10(np.square(a - b).mean((1, 2, 3)))


def ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Structural similarity of each pair of images (Wang et al., "Image Quality Assessment: From Error Visibility to
    Structural Similarity", IEEE TIP 2004, equation 13), with the paper's settings: an 11x11 Gaussian window of sigma 1.5,
    K1 = 0.01, K2 = 0.03, data range 1. The result is the mean over all positions of the window inside the image, and over
    the channels.

    Args:
      a, b: [B, H, W, C] float in [0, 1], at least 11x11 pixels.

    Returns:
      float64 [B], at most 1.

    Raises:
      ValueError: if the shapes differ, for integers, or if the images are smaller than the window.
    """
    a, b = _pair(a, b)
    if min(a.shape[1:3]) < 11:
        raise ValueError(f"images of {a.shape[1]}x{a.shape[2]} pixels, expected at least 11x11, the window of SSIM")

    def window(x):  # [B, H, W, C] -> [B, H - 10, W - 10, C]
        for axis in (1, 2):
            x = np.lib.stride_tricks.sliding_window_view(x, 11, axis=axis) @ SSIM_TAPS
        return x

    return windowed_ssim(a, b, window)


def windowed_ssim(a, b, window):
    """The formula of `ssim` for NumPy or JAX arrays [B, H, W, C] -> [B]. window(x): weighted mean around each position."""
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
        """Counts tokens, integers of any shape in 0 .. codebook_size - 1, and returns self.

        Raises:
          ValueError: for a token out of range.
        """
        tokens = np.asarray(tokens).reshape(-1)
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < len(self.counts):
            raise ValueError(f"tokens reach from {tokens.min()} to {tokens.max()}, expected 0 to {len(self.counts) - 1}")
        self.counts += np.bincount(tokens, minlength=len(self.counts))
        return self

    def merge(self, other: "CodebookUsage") -> "CodebookUsage":
        """Adds the counts of another one and returns self.

        Raises:
          ValueError: if the codebooks have different sizes.
        """
        if len(other.counts) != len(self.counts):
            raise ValueError(f"codebooks of {len(self.counts)} and {len(other.counts)} codes cannot be merged")
        self.counts += other.counts
        return self

    @property
    def usage(self) -> float:
        """Fraction of the codes seen at least once."""
        return float(np.mean(self.counts > 0))

    @property
    def entropy(self) -> float:
        """Entropy of the code distribution in bits: 0 for a single code, log2(codebook_size) if all are equally frequent.
        As in the published evaluator it is -sum p log2(p + 1e-8), which is less than the exact entropy by at most
        codebook_size * 1.5e-8."""
        if not self.counts.any():
            return 0.0
        p = self.counts[self.counts > 0] / self.counts.sum()
        return float(max(0.0, -(p * np.log2(p + 1e-8)).sum()))

    @property
    def perplexity(self) -> float:
        """2 to the entropy: the number of equally frequent codes that have the same entropy, 1 .. codebook_size."""
        return 2.0**self.entropy


class FeatureStatistics:
    """Mean and covariance of feature vectors, over any number of batches and shards.

    Each batch is centred at its own mean and then merged (Chan, Golub and LeVeque, "Algorithms for computing the sample
    variance", 1983). So there is no cancellation, and batch sizes and order change the result only by rounding, about 1e-15.

    Attributes:
      dim: D, the length of a feature vector.
      network: name of the network that computed the features, or "" if unknown. Statistics of two networks are never mixed.
      count: int, number of vectors. 0 if unknown, as in other people's files; then nothing can be added.
      mean: float64 [D].
    """

    def __init__(self, dim: int, network: str = ""):
        self.dim, self.network = dim, network
        self.count, self.mean = 0, np.zeros(dim)
        self._scatter = np.zeros((dim, dim))  # sum of (x - mean) (x - mean)^T
        self._covariance: np.ndarray | None = None  # from a file that does not hold the count

    def update(self, features: np.ndarray) -> "FeatureStatistics":
        """Adds vectors [B, D] of any real dtype, computing in float64, and returns self.

        Raises:
          ValueError: for a wrong shape, for values that are not finite, or if the count is unknown.
        """
        features = np.asarray(features)
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(f"features of shape {list(features.shape)}, expected [B, {self.dim}]")
        if not np.isfinite(features).all():
            raise ValueError("features that are not finite (NaN or infinity); are the images and the weights sound?")
        if len(features):
            features = features.astype(np.float64)
            mean = features.mean(0)
            features -= mean
            self._add(len(features), mean, features.T @ features)
        return self

    def merge(self, other: "FeatureStatistics") -> "FeatureStatistics":
        """Adds the vectors that another one has seen and returns self.

        Raises:
          ValueError: if the length or the network differs, or if a count is unknown.
        """
        self._check_same(other)
        if other._covariance is not None:
            raise ValueError("statistics of an unknown number of images cannot be merged")
        self.network = self.network or other.network
        if other.count:
            self._add(other.count, other.mean, other._scatter)
        return self

    def _add(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        if self._covariance is not None:
            raise ValueError("nothing can be added to statistics of an unknown number of images")
        total, delta = self.count + count, mean - self.mean
        self._scatter += scatter
        self._scatter += np.outer(delta, delta * (self.count * count / total))
        self.mean = self.mean + delta * (count / total)
        self.count = total

    def _check_same(self, other: "FeatureStatistics") -> None:
        if self.network and other.network and self.network != other.network:
            raise ValueError(f"features of {self.network} and of {other.network} cannot be compared")
        if self.dim != other.dim:
            raise ValueError(f"features of length {self.dim} and {other.dim} cannot be compared")

    @property
    def covariance(self) -> np.ndarray:
        """float64 [D, D], divided by count - 1.

        Raises:
          ValueError: for fewer than two vectors.
        """
        if self._covariance is not None:
            return self._covariance
        if self.count < 2:
            raise ValueError(f"a covariance of {self.count} images, expected at least 2")
        return self._scatter / (self.count - 1)

    def save(self, path: str | os.PathLike, spatial: "FeatureStatistics | None" = None) -> None:
        """Writes an .npz file, which is either complete or absent, and replaces one that is there. It holds `mu`, `sigma`,
        `count` and `network`. If `spatial` is given, the statistics for sFID, it also holds `mu_s`, `sigma_s` and
        `count_s`. ADM's evaluator can read it as a reference."""
        arrays: dict[str, np.ndarray] = {}
        for suffix, stats in (("", self), ("_s", spatial)):
            if stats is not None:
                arrays[f"mu{suffix}"], arrays[f"sigma{suffix}"] = stats.mean, stats.covariance
                arrays[f"count{suffix}"] = np.asarray(stats.count, np.int64)
        arrays["network"] = np.asarray(self.network)
        with new_file(path, replace=True) as partial, open(partial, "wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def load(cls, path: str | os.PathLike, *, spatial: bool = False) -> "FeatureStatistics":
        """Reads a file that `save` wrote, or a reference of ADM (`VIRTUAL_imagenet256_labeled.npz`), whose count is unknown
        and whose network is "". Only the named arrays are read, and pickles are never loaded.

        Args:
          spatial: read the statistics for sFID, `mu_s` and `sigma_s`.

        Raises:
          FileNotFoundError: if there is no such file.
          ValueError: if it is not an .npz file, lacks the statistics, or they do not fit together.
        """
        suffix = "_s" if spatial else ""
        with NpzFile(path) as file:
            missing = [name for name in (f"mu{suffix}", f"sigma{suffix}") if name not in file.names]
            if missing:
                raise ValueError(
                    f"{path} holds no {' and no '.join(missing)}; it holds {', '.join(file.names[:5]) or 'nothing'}"
                )
            mean, covariance = file.read(f"mu{suffix}"), file.read(f"sigma{suffix}")
            count = file.read(f"count{suffix}", most=64) if f"count{suffix}" in file.names else np.zeros((), int)
            network = file.text("network", most=2**12) if "network" in file.names else ""
        if count.shape or count.dtype.kind not in "iu":
            raise ValueError(f"{path}: count{suffix} is {count.dtype} {list(count.shape)}, expected one whole number")
        count = int(count)
        sound = mean.ndim == 1 and covariance.shape == 2 * mean.shape and mean.dtype.kind == covariance.dtype.kind == "f"
        if not sound or not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise ValueError(
                f"{path}: mu{suffix} {mean.dtype} {list(mean.shape)} and sigma{suffix} {covariance.dtype} "
                f"{list(covariance.shape)}, expected finite floats of shapes [D] and [D, D]"
            )
        stats = cls(len(mean), network)
        stats.mean = mean.astype(np.float64)
        if count > 1:
            stats.count, stats._scatter = count, covariance.astype(np.float64) * (count - 1)
        else:
            stats._covariance = covariance.astype(np.float64)
        return stats


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of two Gaussians (Heusel et al. 2017, arXiv 1706.08500). It is
    FID for the `pool` features of InceptionV3, and sFID for its `spatial` features.

    As published, 1e-6 is added to the diagonals of both covariances if the root of their product is not finite.

    Raises:
      ValueError: if the lengths or networks of the features differ, or, as published, if the root is not real to 1e-3.
    """
    a._check_same(b)
    covariances = [a.covariance, b.covariance]
    root = _matrix_root(covariances[0] @ covariances[1])
    if not np.isfinite(root).all():
        offset = 1e-6 * np.eye(a.dim)
        root = _matrix_root((covariances[0] + offset) @ (covariances[1] + offset))
    imaginary = np.abs(np.diagonal(root).imag).max()
    if not imaginary <= 1e-3:
        raise ValueError(
            f"the Frechet distance has an imaginary part of {imaginary:.3g}; too few images for {a.dim} features?"
        )
    squared = np.square(a.mean - b.mean).sum()
    return float(squared + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * np.trace(root).real)


def _matrix_root(matrix: np.ndarray) -> np.ndarray:
    import scipy.linalg  # only this needs it; PSNR, for one, does not

    with warnings.catch_warnings():
        # Features that are always 0 make the product singular. The caller checks the values, so no warning is needed.
        warnings.simplefilter("ignore")
        return scipy.linalg.sqrtm(matrix)


class InceptionScore:
    """exp of the mean KL divergence of each image's class distribution from the mean distribution (Salimans et al. 2016,
    arXiv 1606.03498). Batches are added in the order of the images.

    With `chunk_size` None all images are one split, as in the published tokenizer evaluator, and their order does not
    matter. ADM's evaluator averages over consecutive chunks of 5,000 images; the last chunk may be smaller. That score
    **depends on the order of the images** and is lower if they are sorted by class. As in the tokenizer evaluator, 1e-16 is
    added inside the logarithms. ADM adds nothing, which gives the same to 1e-12.

    Attributes:
      chunk_size: images per split, or None.
      count: images seen.
    """

    def __init__(self, chunk_size: int | None = None):
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size is {chunk_size}, expected at least 1")
        self.chunk_size, self.count = chunk_size, 0
        self._scores: list[float] = []  # of the full chunks
        self._start()

    def _start(self) -> None:
        self._in_chunk, self._sum, self._negentropy = 0, np.zeros(()), 0.0

    def update(self, logits: np.ndarray) -> "InceptionScore":
        """Adds images by their logits [B, C] (InceptionV3: without the bias) and returns self.

        Raises:
          ValueError: for a wrong shape, or for logits that are not finite.
        """
        logits = np.asarray(logits)
        if logits.ndim != 2 or (self._sum.ndim and logits.shape[1:] != self._sum.shape):
            raise ValueError(
                f"logits of shape {list(logits.shape)}, expected [B, {len(self._sum) if self._sum.ndim else 'C'}]"
            )
        if not np.isfinite(logits).all():
            raise ValueError("logits that are not finite (NaN or infinity); are the images and the weights sound?")
        while len(logits):
            room = len(logits) if self.chunk_size is None else self.chunk_size - self._in_chunk
            p = np.exp(logits[:room].astype(np.float64) - logits[:room].max(1, keepdims=True))
            p /= p.sum(1, keepdims=True)
            self._in_chunk += len(p)
            self._sum = self._sum + p.sum(0)
            self._negentropy += float((p * np.log(p + 1e-16)).sum())
            self.count += len(p)
            if self._in_chunk == self.chunk_size:
                self._scores.append(self._score())
                self._start()
            logits = logits[room:]
        return self

    def merge(self, other: "InceptionScore") -> "InceptionScore":
        """Adds the images of another one after the own images and returns self.

        Raises:
          ValueError: if the chunk sizes differ, or if the own images end inside a chunk.
        """
        if self.chunk_size != other.chunk_size:
            raise ValueError(f"Inception scores in chunks of {self.chunk_size} and {other.chunk_size} cannot be merged")
        if self.chunk_size is not None and self._in_chunk:
            raise ValueError(
                f"{self.count} images end inside a chunk of {self.chunk_size}, so none can be merged after them"
            )
        self.count += other.count
        self._in_chunk += other._in_chunk
        self._sum = self._sum + other._sum
        self._negentropy += other._negentropy
        self._scores += other._scores
        return self

    def _score(self) -> float:
        mean = self._sum / self._in_chunk
        return float(np.exp(self._negentropy / self._in_chunk - (mean * np.log(mean + 1e-16)).sum()))

    @property
    def value(self) -> float:
        """Mean over the chunks; from 1 to the number of classes.

        Raises:
          ValueError: if there are no images.
        """
        if not self.count:
            raise ValueError("an Inception score of no images")
        return float(np.mean([*self._scores, self._score()] if self._in_chunk else self._scores))


def precision_recall(reference: np.ndarray, samples: np.ndarray, k: int = 3, *, block: int = 512) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991).

    Each vector has a ball that reaches to its k-th nearest neighbour within its own set. Precision is the fraction of
    samples inside the ball of any reference. Recall is the fraction of references inside the ball of any sample. Everything
    is in float64. ADM's evaluator computes distances in float16 if they are finite, so it may differ in the third digit.

    Args:
      reference, samples: [R, D] and [S, D], any real dtype. ADM uses the features of its 10,000 reference images and of all
        50,000 samples.
      k: 1 .. min(R, S) - 1.
      block: rows per block. It bounds the memory to [block, max(R, S)] float64 beside the two sets.

    Returns:
      (precision, recall).

    Raises:
      ValueError: if the shapes do not fit, or k is out of range.
    """
    reference, samples = np.asarray(reference), np.asarray(samples)
    if reference.ndim != 2 or samples.ndim != 2 or reference.shape[1] != samples.shape[1]:
        raise ValueError(f"shapes {list(reference.shape)} and {list(samples.shape)}, expected [R, D] and [S, D]")
    if not 1 <= k < min(len(reference), len(samples)):
        raise ValueError(
            f"k is {k}, expected 1 to {min(len(reference), len(samples)) - 1}, less than either set has vectors"
        )
    reference, samples = reference.astype(np.float64), samples.astype(np.float64)

    def squared_distances(a, b):  # yields rows of a and their distances [rows, len(b)]
        norms_a, norms_b = np.square(a).sum(1), np.square(b).sum(1)
        for start in range(0, len(a), block):
            rows = slice(start, start + block)
            distances = a[rows] @ b.T
            distances *= -2.0
            distances += norms_a[rows, None]
            distances += norms_b
            yield rows, np.maximum(distances, 0.0, out=distances)

    def radii(x):  # [N]; index k, not k - 1, because the smallest distance is that of a vector to itself
        return np.concatenate([np.partition(distances, k, axis=1)[:, k] for _, distances in squared_distances(x, x)])

    reference_radii, sample_radii = radii(reference), radii(samples)
    sample_inside = np.zeros(len(samples), bool)
    reference_inside = np.zeros(len(reference), bool)
    for rows, distances in squared_distances(reference, samples):
        sample_inside |= (distances <= reference_radii[rows, None]).any(0)
        reference_inside[rows] = (distances <= sample_radii).any(1)
    return float(sample_inside.mean()), float(reference_inside.mean())


def nearest_neighbours(
    queries: np.ndarray, references: np.ndarray, k: int = 1, *, block: int = 256
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest references of each query by exhaustive search, nearest first. Ties go to the lower index.

    Args:
      queries, references: [Q, D], [R, D], any real dtype.
      k: 1 .. R.
      block: queries per block. It bounds the memory to [block, R] and [block, k, D] float64.

    Returns:
      Euclidean distances float64 [Q, k] and indices into the references int64 [Q, k].

    Raises:
      ValueError: if the shapes do not fit, or k is out of range.
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
        # |query|^2 is left out because it is the same for all references. Exact if the values are integers.
        near = np.argsort(norms - 2.0 * part @ references.T, axis=1, kind="stable")[:, :k]
        # Distances from differences: the expansion above would not give 0 for an exact copy.
        exact = np.sqrt(np.square(part[:, None] - references[near]).sum(-1))
        order = np.argsort(exact, axis=1, kind="stable")
        indices[start : start + block] = np.take_along_axis(near, order, 1)
        distances[start : start + block] = np.take_along_axis(exact, order, 1)
    return distances, indices


def knn_classify(queries: np.ndarray, references: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    """The most frequent label among the k nearest references. A tie goes to the label with the nearest reference.

    Args:
      queries, references: [Q, D], [R, D], any real dtype.
      labels: int [R], the labels of the references, at least 0.
      k: 1 .. R.

    Returns:
      int64 [Q].

    Raises:
      ValueError: as `nearest_neighbours`, and if the numbers of labels and references differ.
    """
    labels = np.asarray(labels)
    if labels.shape != (len(references),):
        raise ValueError(f"labels have shape {list(labels.shape)}, expected [{len(references)}], one for each reference")
    votes = labels[nearest_neighbours(queries, references, k)[1]]  # [Q, k], nearest first
    counts = (votes[:, :, None] == votes[:, None, :]).sum(-1)  # [Q, k]: votes for the label of each neighbour
    return votes[np.arange(len(votes)), counts.argmax(1)].astype(np.int64)  # argmax takes the first, the nearest
