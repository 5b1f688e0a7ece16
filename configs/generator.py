"""Masked generators: generate a tokenizer's tokens for a given class.

  python -m titok_jax.train --config configs/generator.py:b64 --workdir runs/b64_generator \
      --config.data.source.paths='TOKENS/*.array_record'

The data are token records. To make tokens from images during training, use l32_images, b64_images or s128_images, and set
--config.tokenizer and --config.data.source.paths (slower, but every flip is drawn anew).

Variants: l32 and b64 (ViT), s128 (U-ViT). Published gFID: 2.77, 2.48, 1.97, after about 1 day (32 tokens) to 2 days (128) on
32 A800. l64_512 and b128_512 generate tokens for images of 512 x 512 pixels; published gFID: 2.74, and 2.49 (2.13 in 64
steps). `:smoke` is a small generator of the embedded digits' tokens, about a minute on a CPU. `:smoke_tokens` is the same on
token records.

Values: the published configs/training/generator/maskgit.yaml (B-64; batch 64 on each of 32 GPUs). The other two have no
published file: their sizes are those of their published weights, and the rest is the same. The sampling settings are those
of the published results, configs/infer/TiTok/titok_*.yaml.
"""

from ml_collections import ConfigDict

from configs import common

# model, tokens, (width, layers, heads, MLP), (steps, temperature, guidance, its schedule)
VIT, UVIT = (768, 24, 16, 3072), (1024, 20, 16, 4096)
VARIANTS = {
    "l32": ("ViT", 32, VIT, (8, 9.5, 4.5, "linear")),
    "b64": ("ViT", 64, VIT, (8, 11.0, 3.0, "linear")),
    "s128": ("UViT", 128, UVIT, (64, 2.8, 6.9, "power-cosine")),
    # 512 x 512 pixels: no sampling settings were published. These are from the 256-pixel tokenizer of the same size.
    "l64_512": ("ViT", 64, VIT, (8, 9.5, 4.5, "linear")),
    "b128_512": ("ViT", 128, VIT, (8, 11.0, 3.0, "linear")),
    "smoke": ("ViT", 8, VIT, (8, 1.0, 3.0, "linear")),
    "smoke_tokens": ("ViT", 8, VIT, (8, 1.0, 3.0, "linear")),
}


def get_config(variant: str = "l32") -> ConfigDict:
    images = variant.endswith("_images")
    model_type, num_tokens, (width, layers, heads, mlp), sampling = common.pick(VARIANTS, variant.removesuffix("_images"))
    config = common.base("generator")
    config.num_steps = 500_000
    config.tokenizer, config.token_precision = "", "highest"
    if images:
        config = common.at_size(config, 512 if "512" in variant else 256)
        config.data.transform.random_crop = False
    else:
        config.data.source = ConfigDict({"name": "tokens", "paths": ""})
        config.data.eval_source = ConfigDict({"name": "tokens", "paths": ""})
        config.data.transform = config.data.eval_transform = None
    config.data.batch_size = 2048
    config.model = ConfigDict(
        {
            "model_type": model_type,
            "num_tokens": num_tokens,
            "codebook_size": 4096,
            "num_classes": 1000,
            "hidden_size": width,
            "num_layers": layers,
            "num_heads": heads,
            "intermediate_size": mlp,
            "dropout": 0.1,
            "attn_dropout": 0.1,
            "class_label_dropout": 0.1,
            "sampling": dict(
                zip(("num_steps", "temperature", "guidance_scale", "guidance_schedule"), sampling, strict=True),
                guidance_scale_pow=3.0,
                softmax_temperature_annealing=True,
            ),
        }
    )
    config.loss = ConfigDict({"label_smoothing": 0.1, "unmasked_weight": 0.1})
    config.optimizer = common.optimizer(2e-4, beta2=0.96, weight_decay=0.03, warmup_steps=10_000)
    config = common.finish(config, smoke=variant.startswith("smoke"))
    if variant == "smoke_tokens":
        config.data.source = ConfigDict({"name": "tokens", "paths": ""})
        config.data.transform = None
    return config
