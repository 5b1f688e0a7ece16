"""What the recipes for ImageNet share, and their small form: the embedded digits, to see in a minute that a recipe runs."""

from ml_collections import ConfigDict

# Sizes of the two-stage tokenizers: (transformers, tokens, pixels per side). Of the two for 512 pixels no weights were
# published; the paper says (arXiv 2406.07550, section 4) that for this resolution the number of tokens is doubled.
TWO_STAGE = {
    "l32": ("large", 32, 256),
    "b64": ("base", 64, 256),
    "s128": ("small", 128, 256),
    "l64_512": ("large", 64, 512),
    "b128_512": ("base", 128, 512),
    "smoke": ("small", 8, 256),
}


def pick(variants: dict, variant: str):
    """The entry `variant`.

    Raises:
      ValueError: there is none.
    """
    if variant not in variants:
        raise ValueError(f"variant {variant!r}, expected one of {list(variants)}")
    return variants[variant]


def images() -> dict[str, str]:
    """A source of images to be filled in by flags: what tools/prepare_imagenet.py writes, or with another `name` what
    titok_jax/data/sources.py has. The options are those of all kinds; an empty one is not given."""
    return {"name": "array_record", "paths": "", "path": "", "dataset": "", "data_dir": "", "split": ""}


def base(task: str) -> ConfigDict:
    """Everything that is the same in all recipes."""
    config = ConfigDict()
    config.task = task
    config.seed = 42
    config.init_from = ""
    config.data = ConfigDict(
        {
            "source": images(),
            "eval_source": images(),  # none, until it is said where
            "transform": {"name": "random_resize_crop_flip", "resize_shorter_edge": 256, "crop_size": 256},
            "eval_transform": {"name": "center_crop_torchvision", "size": 256},
            "batch_size": 256,
            "num_workers": 16,
            "num_threads": 16,
        },
        type_safe=False,  # a source has other fields than another
    )
    config.ema_decay = 0.999
    config.ema_ramp = True  # as published; False: the same decay at every step
    config.compute_dtype = "bfloat16"
    config.remat = False
    config.gradient_accumulation = 1
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
    config.log_every = 50
    config.checkpoint_every = 5000
    config.keep_checkpoints = 2
    config.eval_every = 5000
    config.eval_images = 5000
    config.max_nonfinite_steps = 20  # in a row
    config.preview_every = 5000
    config.preview_images = 32
    config.preview_columns = 8
    return config


def optimizer(learning_rate: float, *, beta2: float, weight_decay: float, warmup_steps: int) -> ConfigDict:
    """AdamW as in all published recipes: cosine to 1e-5, gradients clipped to norm 1."""
    return ConfigDict(
        {
            "learning_rate": learning_rate,
            "end_learning_rate": 1e-5,
            "schedule": "cosine",
            "warmup_steps": warmup_steps,
            "beta1": 0.9,
            "beta2": beta2,
            "weight_decay": weight_decay,
            "max_grad_norm": 1.0,
        }
    )


def at_size(config: ConfigDict, pixels: int) -> ConfigDict:
    """The recipe on images of another size than 256: the crops too, and the discriminator's patches as large as before."""
    config.data.transform.update({"resize_shorter_edge": pixels, "crop_size": pixels})
    config.data.eval_transform.size = pixels
    if "discriminator" in config:
        config.discriminator.logits_size = pixels // 16
    return config


def two_stage_model(size: str, num_tokens: int, pixels: int, *, finetune_decoder: bool) -> ConfigDict:
    """A two-stage tokenizer."""
    return ConfigDict(
        {
            "image_size": pixels,
            "patch_size": 16,
            "num_latent_tokens": num_tokens,
            "token_size": 12,
            "quantize_mode": "vq",
            "codebook_size": 4096,
            "use_l2_norm": True,
            "commitment_cost": 0.0 if finetune_decoder else 0.25,
            "encoder": size,
            "decoder": size,
            "is_legacy": True,
            "finetune_decoder": finetune_decoder,
        },
        type_safe=False,  # a size is a name or numbers
    )


def finish(config: ConfigDict, *, smoke: bool) -> ConfigDict:
    """The recipe as it is or its small form, with a copy in `config.recipe` of the values that belong together: train.py
    warns where a run has others."""
    if smoke:
        shrink(config)
    recipe = {"num_steps": config.num_steps, "data": {"batch_size": config.data.batch_size}}
    for name in ("optimizer", "discriminator_optimizer"):
        if name in config:
            recipe[name] = {"learning_rate": config[name].learning_rate}
    config.recipe = ConfigDict(recipe)
    return config


def shrink(config: ConfigDict) -> None:
    """The recipe on the digits of 32 x 32 pixels, for a few steps."""
    config.num_steps = 150
    config.compute_dtype = "float32"
    config.log_every = 10
    config.checkpoint_every = 75
    config.eval_every = 75
    config.eval_images = 128
    config.preview_every = 75
    config.preview_images, config.preview_columns = 20, 10
    config.data.update({"batch_size": 32, "num_workers": 0, "num_threads": 2})
    config.data.eval_transform = None
    config.data.source = ConfigDict({"name": "digits", "split": "train"})
    config.data.eval_source = ConfigDict({"name": "digits", "split": "test"})
    config.data.transform = ConfigDict({"name": "jitter"})
    for name in ("optimizer", "discriminator_optimizer"):
        if name in config:
            config[name].update({"learning_rate": 1e-3, "warmup_steps": 15})
    if "discriminator" in config:
        config.discriminator.update({"hidden_channels": 32, "num_stages": 2, "logits_size": 8})
        config.loss.discriminator_start = 75
    vqgan = {"hidden_channels": 32, "channel_mult": (1, 1, 1, 1), "num_res_blocks": 1, "z_channels": 32}
    if "vqgan" in config:  # nothing is learnt from a random one; it shows that the steps work
        config.vqgan = "random"
        config.vqgan_model = ConfigDict(vqgan)
    if "perceptual_weights" in config:  # no trained network comes with the package
        config.loss.perceptual = "none"
    size = {"width": 96, "num_layers": 2, "num_heads": 3}
    if config.task == "maskgit_vqgan":
        config.model.update({**vqgan, "resolution": 32})
    elif config.task == "generator":
        config.tokenizer = "digits"
        config.model.update(
            {"num_classes": 10, "hidden_size": 96, "num_layers": 2, "num_heads": 3, "intermediate_size": 192}
        )
    else:
        config.model.update({"image_size": 32, "patch_size": 8, "num_latent_tokens": 8, "encoder": size, "decoder": size})
        config.model.codebook_size = 256
