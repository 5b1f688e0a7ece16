"""What the ImageNet recipes share, and their small smoke variants on the embedded digits, which run in a minute."""

from ml_collections import ConfigDict

from titok_jax.runtime.messages import near

# Sizes of the two-stage tokenizers: (transformers, tokens, pixels per side). No weights were published for the two models
# with 512 pixels. The paper says that the number of tokens is doubled at this resolution (arXiv 2406.07550, section 4).
TWO_STAGE = {
    "l32": ("large", 32, 256),
    "b64": ("base", 64, 256),
    "s128": ("small", 128, 256),
    "l64_512": ("large", 64, 512),
    "b128_512": ("base", 128, 512),
    "smoke": ("small", 8, 256),
}


def pick(variants: dict, variant: str):
    """Returns the entry `variant`.

    Raises:
      ValueError: if there is no such entry.
    """
    if variant not in variants:
        raise ValueError(f"variant {variant!r}, expected one of {list(variants)}{near(variant, variants)}")
    return variants[variant]


def images() -> dict[str, str | bool]:
    """An image source whose options are to be set on the command line. It reads the files that tools/prepare_imagenet.py
    writes; another `name` selects another source of titok_jax/data/sources.py. It has the options of all sources; empty
    options are ignored."""
    names = ("paths", "path", "dataset", "data_dir", "split", "image_key", "label_key")
    return {"name": "array_record", **dict.fromkeys(names, ""), "skip_damaged": False}


def base(task: str) -> ConfigDict:
    """The values that all ImageNet recipes start from."""
    config = ConfigDict()
    config.task = task
    config.seed = 42
    config.init_from = ""
    config.data = ConfigDict(
        {
            "source": images(),
            "eval_source": images(),  # nothing is held out until a path is set
            "transform": {
                "name": "random_resize_crop_flip",
                "resize_shorter_edge": 256,
                "crop_size": 256,
                "random_crop": True,
                "random_flip": True,
            },
            "eval_transform": {"name": "center_crop_torchvision", "size": 256, "resize_shorter_edge": 256},
            "batch_size": 256,
            "num_workers": 16,
            "num_threads": 16,
            "read_ahead_mib": 1024,
        },
        type_safe=False,  # sources differ in their fields
    )
    config.scale_with_batch = False  # True: learning rate, steps and averages follow another data.batch_size
    config.ema_decay = 0.999
    config.ema_ramp = True  # as published; False: the same decay at every step
    config.compute_dtype = "bfloat16"
    # What the layers of a transformer keep for the backward pass: "none" keeps all, "full" only their inputs.
    config.remat = "none" if task == "maskgit_vqgan" else "dots"
    config.scan_layers = "auto"  # or "True": layers as a loop; "False": one after the other
    config.gradient_accumulation = 1
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1, "dcn_data": -1, "shard_optimizer": True})
    config.log_every, config.log_grad_norms = 50, False
    config.checkpoint_every = 5000
    config.keep_checkpoints = 2
    config.eval_every = 5000
    config.eval_images = 5000
    config.max_nonfinite_steps = 20  # in a row
    # Of a TPU's compiler, from -1 to 1. At 0, the gradients of a pixel decoder and a discriminator can take it hours.
    config.compile_effort = -0.3 if task in ("maskgit_vqgan", "stage2", "single_stage") else 0.0
    config.watchdog_minutes = 30.0  # of one step; 0: no watch
    config.preview_every = 5000
    config.preview_images = 32
    config.preview_columns = 8
    return config


def optimizer(learning_rate: float, *, beta2: float, weight_decay: float, warmup_steps: int) -> ConfigDict:
    """AdamW as in all published recipes: cosine schedule down to 1e-5, gradients clipped to norm 1."""
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
            "mu_dtype": "float32",
        }
    )


def at_size(config: ConfigDict, pixels: int) -> ConfigDict:
    """Adapts a recipe to images of another size than 256. Sets the crops, and keeps the discriminator's patch size."""
    config.data.transform.update({"resize_shorter_edge": pixels, "crop_size": pixels})
    config.data.eval_transform.update({"resize_shorter_edge": pixels, "size": pixels})
    if "discriminator" in config:
        config.discriminator.logits_size = pixels // 16
    return config


def two_stage_model(size: str, num_tokens: int, pixels: int, *, finetune_decoder: bool) -> ConfigDict:
    """The model of a two-stage tokenizer."""
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
    """Completes a recipe, or its small variant if `smoke`. Copies the values that belong together to `config.recipe`;
    train.py warns if a run changes one of them."""
    if smoke:
        shrink(config)
    recipe = {"num_steps": config.num_steps, "data": {"batch_size": config.data.batch_size}}
    for name in ("optimizer", "discriminator_optimizer"):
        if name in config:
            recipe[name] = {"learning_rate": config[name].learning_rate}
    config.recipe = ConfigDict(recipe)
    return config


def shrink(config: ConfigDict) -> None:
    """Changes a recipe to a few steps on the digits, with 32 x 32 pixels."""
    config.num_steps = 150
    config.compute_dtype, config.remat = "float32", "none"
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
    if "vqgan" in config:  # a random VQGAN teaches nothing, but shows that the steps run
        config.vqgan = "random"
        config.vqgan_model = ConfigDict(vqgan)
    if "perceptual_weights" in config:  # no trained network comes with the package
        config.loss.perceptual = "none"
    size = {"width": 96, "num_layers": 2, "num_heads": 3}
    if config.task == "maskgit_vqgan":
        config.model.update({**vqgan, "resolution": 32})
    elif config.task == "generator":
        config.tokenizer = "digits"
        config.model.update({"num_tokens": 0, "codebook_size": 0})  # those of the tokenizer
        config.model.update(
            {"num_classes": 10, "hidden_size": 96, "num_layers": 2, "num_heads": 3, "intermediate_size": 192}
        )
    else:
        config.model.update({"image_size": 32, "patch_size": 8, "num_latent_tokens": 8, "encoder": size, "decoder": size})
        config.model.codebook_size = 256
