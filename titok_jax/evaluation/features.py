"""Feature networks for distances between sets of images, ready to use.

There are two. InceptionV3 of 2015-12-05 is the network of FID, sFID, the Inception score, precision and recall. A small
classifier of the embedded digits gives the same metrics under the names digits-FID and so on. If a network is missing, that
is an error; it is never replaced by another one.
"""

import dataclasses
import hashlib
import os
from collections.abc import Callable

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from titok_jax import models
from titok_jax.models import DigitsNetConfig, InceptionConfig, digits_net
from titok_jax.runtime import placement, sharding
from titok_jax.runtime.paths import as_path, local_copy
from titok_jax.weights import convert, kinds, published_models, tensor_files
from titok_jax.weights.convert import WeightsError
from titok_jax.weights.perceptual_files import load_perceptual

INCEPTION = "inception-2015-12-05"
DIGITS = "digits"

# torch-fidelity publishes it; pytorch-fid publishes the same file as pt_inception-2015-12-05-6726825d.pth.
INCEPTION_URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
# The metadata of a converted file.
CONVERTED_FROM_PUBLISHED = {"source_sha256": INCEPTION_SHA256}
INCEPTION_VARIABLE = "TITOK_JAX_INCEPTION"

DIGITS_WEIGHTS = published_models.EMBEDDED / "digits_features" / "model.safetensors"


@dataclasses.dataclass(frozen=True)
class Features:
    """Features of a batch of images, float32.

    Attributes:
      pool: [B, D], for FID, precision and recall. D is 2,048 for InceptionV3 and 64 for digits.
      spatial: [B, 2023], for sFID; None for digits.
      logits: [B, C], for the Inception score. C is 1,008 for InceptionV3 (no bias, as published) and 10 for digits.
    """

    pool: np.ndarray
    spatial: np.ndarray | None
    logits: np.ndarray


class FeatureNetwork:
    """A feature network with its weights.

    Attributes:
      name: "inception-2015-12-05" or "digits". Pass it to `metrics.FeatureStatistics`, which keeps the two apart.
      dim, spatial_dim, num_classes: lengths of the three features; `spatial_dim` is None if there is no such feature.
      image_size: pixels per side that images must have. None accepts any size, and the network resizes the images.
    """

    def __init__(
        self,
        name: str,
        apply: Callable[[convert.Params, jax.Array], tuple[jax.Array, jax.Array | None, jax.Array]],
        params: convert.Params,
        *,
        dim: int,
        spatial_dim: int | None,
        num_classes: int,
        image_size: int | None = None,
        batch_size: int = 64,
        mesh: Mesh | None = None,
    ):
        """
        Args:
          apply: (params, uint8 images [B, H, W, 3]) -> pool, spatial and logits.
          batch_size: images per batch, rounded up to a multiple of the devices that share a batch.
          mesh: the mesh to shard batches along; by default a mesh of this process's devices. Each of several processes
            passes its own images and gets their features. Merge their statistics with `FeatureStatistics.merge`.
        """
        self.name, self.image_size = name, image_size
        self.dim, self.spatial_dim, self.num_classes = dim, spatial_dim, num_classes
        self._mesh = sharding.make_mesh(devices=jax.local_devices()) if mesh is None else mesh
        devices = self._mesh.shape["data"] * self._mesh.shape["fsdp"]
        self._batch_size = -(-batch_size // devices) * devices
        self._params = placement.put(params, sharding.replicated(self._mesh), name)
        self._apply = jax.jit(apply)

    def __call__(self, images: np.ndarray) -> Features:
        """Computes the features of any number of images, in their order. No image is dropped, and the features of an image
        do not depend on the others.

        Args:
          images: uint8 [B, H, W, 3], B at least 1. Each new image size causes a compilation.

        Raises:
          ValueError: for a wrong shape or dtype.
        """
        images = np.asarray(images)
        if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8 or not len(images):
            raise ValueError(f"images are {images.dtype} {list(images.shape)}, expected uint8 [B, H, W, 3]")
        if self.image_size is not None and images.shape[1:3] != (self.image_size, self.image_size):
            raise ValueError(
                f"images of {images.shape[1]}x{images.shape[2]} pixels, expected {self.image_size}x{self.image_size}: the "
                f"{self.name} network has no other size"
            )
        parts = []
        for start in range(0, len(images), self._batch_size):
            batch = images[start : start + self._batch_size]
            filled = np.zeros((self._batch_size, *images.shape[1:]), np.uint8)
            filled[: len(batch)] = batch
            placed = sharding.put_batch(self._mesh, {"images": filled})["images"]
            parts.append([None if x is None else np.asarray(x)[: len(batch)] for x in self._apply(self._params, placed)])
        pool, spatial, logits = zip(*parts, strict=True)
        return Features(
            np.concatenate(pool), None if self.spatial_dim is None else np.concatenate(spatial), np.concatenate(logits)
        )


def load_inception(
    path: str | os.PathLike | None = None, *, batch_size: int = 64, mesh: Mesh | None = None
) -> FeatureNetwork:
    """Loads InceptionV3 with the weights that FID is defined on.

    Args:
      path: the published weights-inception-2015-12-05-6726825d.pth (which needs PyTorch), or the output of
        tools/convert_weights.py for it. None means the path in the environment variable TITOK_JAX_INCEPTION.
      batch_size, mesh: as in `FeatureNetwork`.

    Raises:
      FileNotFoundError: if no path is given, or there is no such file. The message says where to download it.
      WeightsError: if the file is damaged or is a different one.
    """
    path = os.environ.get(INCEPTION_VARIABLE) or None if path is None else path
    if path is None or not as_path(path).is_file():
        raise FileNotFoundError(
            f"FID needs the weights of InceptionV3, but {'none are given' if path is None else f'{path} is not a file'}: "
            f"download {INCEPTION_URL} (96 MB) and name it by --inception or {INCEPTION_VARIABLE}; where PyTorch is not "
            "installed, convert it first: python tools/convert_weights.py FILE.pth FILE.safetensors. PSNR, SSIM and the "
            "use of the codebook need none: --reconstruct DATA --features none"
        )
    path = local_copy(path)
    verify_inception(path)
    config = InceptionConfig()
    graphdef, abstract = models.abstract(config)
    with tensor_files.open_weights(path) as (_, tensors):
        params = convert.from_published(convert.table_for(config), abstract, tensors, source=str(path))

    def apply(params, images):
        found = nnx.merge(graphdef, params)(images)
        return found.pool, found.spatial, found.logits_unbiased

    sizes = {"dim": 2048, "spatial_dim": 2023, "num_classes": 1008}
    return FeatureNetwork(INCEPTION, apply, params, **sizes, batch_size=batch_size, mesh=mesh)


def verify_inception(path: str | os.PathLike) -> None:
    """Raises WeightsError unless a file is the published one, by its SHA-256, or its metadata says that it was converted
    from that one. (A converted file holds a checksum of every tensor, which is checked when the file is read.)"""
    if CONVERTED_FROM_PUBLISHED.items() <= tensor_files.safetensors_metadata(path).items():
        return
    names = tensor_files.tensor_names(path)
    if names is not None:  # a file of another network need not be hashed
        kinds.check_tensors(names, InceptionConfig, str(path))
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != INCEPTION_SHA256:
        raise WeightsError(
            f"{path} is not the InceptionV3 of FID: its SHA-256 is {found}, expected {INCEPTION_SHA256}, and it does not "
            f"say that it was converted from that file; download {INCEPTION_URL} and use it, or what "
            "tools/convert_weights.py makes of it"
        )


def load_digits_features(
    path: str | os.PathLike = DIGITS_WEIGHTS, *, batch_size: int = 256, mesh: Mesh | None = None
) -> FeatureNetwork:
    """Loads the classifier of 32 x 32 digits, trained on the embedded training digits (tools/train_digits_features.py). It
    classifies 99 % of the held-out digits correctly.

    Args:
      path: its weights; by default the embedded ones.
      batch_size, mesh: as in `FeatureNetwork`.

    Raises:
      FileNotFoundError: if there is no such file.
      WeightsError: if the file is damaged or holds other weights.
    """
    config = DigitsNetConfig()
    graphdef, abstract = models.abstract(config)
    with tensor_files.open_weights(path) as (_, tensors):
        params = convert.from_published(convert.table_for(config), abstract, tensors, source=str(path))

    def apply(params, images):
        features, logits = nnx.merge(graphdef, params)(images)
        return features, None, logits

    sizes = {"dim": digits_net.FEATURES, "spatial_dim": None, "num_classes": digits_net.NUM_CLASSES}
    return FeatureNetwork(DIGITS, apply, params, **sizes, image_size=digits_net.IMAGE_SIZE, batch_size=batch_size, mesh=mesh)


def load_lpips(folder: str | os.PathLike, *, mesh: Mesh | None = None) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Loads LPIPS with VGG16 (Zhang et al. 2018, arXiv 1801.03924), at the images' own resolution.

    Args:
      folder: holds vgg16-397923af and lpips_vgg, each as .pth or .safetensors.
      mesh: the mesh to shard batches along; the batch size must be a multiple of its devices. None means one device.

    Returns:
      A function of (images, reconstructions), both [B, H, W, 3] float in [0, 1], that returns distances float64 [B]. It is
      compiled for each shape.

    Raises:
      FileNotFoundError, WeightsError: as `titok_jax.weights.perceptual_files.load_perceptual`.
    """
    perceptual = load_perceptual("lpips", folder, advice="set --lpips to the folder that holds it")
    params = perceptual.params
    params = jax.device_put(params) if mesh is None else placement.put(params, sharding.replicated(mesh), "LPIPS")

    def distance(params, images, reconstructions):
        with jax.default_matmul_precision("highest"):
            return perceptual.distance(params, sharding.hint(images, "batch"), sharding.hint(reconstructions, "batch"))

    distance = sharding.jit_on(mesh, distance)
    return lambda images, reconstructions: np.asarray(distance(params, images, reconstructions), np.float64)
