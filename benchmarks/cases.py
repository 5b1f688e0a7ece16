"""What benchmarks/speed.py measures, and what it asks the process of a side for."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from titok_jax.weights import known_models


class Case(NamedTuple):
    """A case to measure.

    Attributes:
      kind: "encode", "decode", "sample" or "train".
      model: a name in the zoo, or a recipe TASK:VARIANT.
      batches: batch sizes, (on a CPU, on other devices).
      recipe: for training, the configuration file of the published trainer.
      changes: changes to that file that make it equal to our recipe.
      target: how many times as fast as the published code, not compiled, it is meant to be on an H100 or H200, with no more
        memory, and no slower than under torch.compile.
    """

    kind: str
    model: str
    batches: tuple[int, int]
    recipe: str | None = None
    changes: Mapping[str, Any] | None = None
    target: float | None = None

    @property
    def name(self) -> str:
        return f"{self.kind} {self.model}"

    @property
    def comparable(self) -> bool:
        """Whether the published code does the same."""
        return self.kind != "train" or self.recipe is not None


_GAN = {"losses": {"discriminator_start": 0}}  # both updates from the first step
_GENERATOR = "configs/training/generator/maskgit.yaml"
_GENERATOR_L32 = {"model": {"vq_model": {"num_latent_tokens": 32}}}
_GENERATOR_S128 = {
    "model": {
        "vq_model": {"num_latent_tokens": 128},
        "generator": {"model_type": "UViT", "hidden_size": 1024, "num_hidden_layers": 20, "intermediate_size": 4096},
    }
}
_SINGLE_STAGE = "configs/training/TA-TiTok/tatitok_bl64_vq.yaml"

# Training uses the published batch sizes per GPU.
CASES = (
    *(Case(kind, f"titok_{name}", (4, 64)) for name in ("l32", "s128", "bl64_vq8k") for kind in ("encode", "decode")),
    *(Case("sample", f"titok_{name}", (4, 64)) for name in ("l32", "b64", "s128")),
    Case("train", "stage1:l32", (2, 32), "configs/training/TiTok/stage1/titok_l32.yaml", target=2.2),
    Case("train", "stage1:b64", (2, 32), "configs/training/TiTok/stage1/titok_b64.yaml", target=2.0),
    Case("train", "stage2:l32", (2, 32), "configs/training/TiTok/stage2/titok_l32.yaml", _GAN, 1.5),
    Case(
        "train", "single_stage:bl64_vq8k", (2, 32), _SINGLE_STAGE, _GAN | {"dataset": {"preprocessing": {"crop_size": 256}}}
    ),
    Case("train", "generator:l32", (8, 64), _GENERATOR, _GENERATOR_L32, 6.0),
    Case("train", "generator:s128", (4, 64), _GENERATOR, _GENERATOR_S128),
    Case("train", "maskgit_vqgan:imagenet256", (2, 16)),
)


def request(case: Case, side: str, dtype: str, batch: int, rounds: int) -> dict[str, Any]:
    """What the process of a side is asked to measure."""
    asked = {"kind": case.kind, "model": case.model, "dtype": dtype, "batch": batch, "rounds": rounds}
    if side == "titok_jax":
        return asked
    asked["compile"] = side == "compiled"
    if case.kind == "train":
        return asked | {"task": case.model.split(":")[0], "recipe": case.recipe, "changes": case.changes or {}}
    known = known_models.known_configs()
    tokenizer = known["tokenizer", case.model]
    asked |= {"tokenizer": tokenizer.to_published(), "image_size": tokenizer.image_size}
    if case.kind == "sample":
        config = known["generator", case.model]
        settings = config.sampling
        asked["generator"] = config.to_published()
        asked["settings"] = {
            "guidance_scale": settings.guidance_scale,
            "guidance_decay": settings.guidance_schedule,
            "randomize_temperature": settings.temperature,
            "softmax_temperature_annealing": settings.softmax_temperature_annealing,
            "num_sample_steps": settings.num_steps,
        }
    return asked
