"""Single-stage tokenizers, discrete and continuous: trained on pixels from the start.

  python -m titok_jax.train --config configs/single_stage.py:bl64_vq8k --workdir runs/bl64 \
      --config.data.source.paths='IMAGENET/train-*' --config.perceptual_weights=WEIGHTS

WEIGHTS contains convnext_small-0c510722.pth and vgg16-397923af.pth of torchvision and lpips_vgg.pth of LPIPS. Variants and
published rFID: bl64_vq8k 2.06, bl128_vq8k 1.49, sl256_vq8k 1.03, ll32_vae 1.61, bl64_vae 1.25, bl128_vae 0.84. `:smoke` (VQ)
and `:smoke_vae` are small models on the embedded digits, about two minutes on a CPU, without perceptual loss.

Values: no configuration of these models was published. The authors stated the length and the batch size (1M steps of 256
images, 200 epochs). The rest is from the later text-aware models, configs/training/TA-TiTok/tatitok_bl64_vq.yaml and
tatitok_bl64_vae.yaml, without text and without their codebook restarts.
"""

from ml_collections import ConfigDict

from configs import common

# encoder, decoder, tokens, mode
VARIANTS = {
    "bl64_vq8k": ("base", "large", 64, "vq"),
    "bl128_vq8k": ("base", "large", 128, "vq"),
    "sl256_vq8k": ("small", "large", 256, "vq"),
    "ll32_vae": ("large", "large", 32, "vae"),
    "bl64_vae": ("base", "large", 64, "vae"),
    "bl128_vae": ("base", "large", 128, "vae"),
    "smoke": ("small", "small", 8, "vq"),
    "smoke_vae": ("small", "small", 8, "vae"),
}


def get_config(variant: str = "bl64_vq8k") -> ConfigDict:
    encoder, decoder, num_tokens, mode = common.pick(VARIANTS, variant)
    config = common.base("single_stage")
    config.num_steps = 1_000_000
    config.perceptual_weights = ""
    config.model = ConfigDict(
        {
            "image_size": 256,
            "patch_size": 16,
            "num_latent_tokens": num_tokens,
            "token_size": 64 if mode == "vq" else 16,
            "quantize_mode": mode,
            "codebook_size": 8192,
            "use_l2_norm": False,
            "commitment_cost": 0.25,
            "encoder": encoder,
            "decoder": decoder,
            "is_legacy": False,
            "finetune_decoder": False,
        },
        type_safe=False,  # a size is a name or numbers
    )
    config.restart_codes = False
    config.loss = ConfigDict(
        {
            "reconstruction": "l2",
            "reconstruction_weight": 1.0,
            "quantizer_weight": 1.0,
            "kl_weight": 1e-6,
            "perceptual": "lpips-convnext_s-1.0-0.1",
            "perceptual_weight": 1.1,
            "discriminator_weight": 0.1,
            "discriminator_factor": 1.0,
            "discriminator_start": 200_000,
            "lecam_weight": 0.001,
            "lecam_decay": 0.999,
        }
    )
    config.optimizer = common.optimizer(1e-4, beta2=0.999, weight_decay=1e-4, warmup_steps=10_000)
    config.discriminator = ConfigDict({"hidden_channels": 128, "num_stages": 3, "logits_size": 16})
    config.discriminator_dtype = "float32"
    config.discriminator_optimizer = common.optimizer(1e-4, beta2=0.999, weight_decay=1e-4, warmup_steps=10_000)
    if variant.startswith("smoke"):
        config.loss.discriminator_weight = 0.01  # without a perceptual loss, 0.1 would outweigh the reconstruction
        # At first the latents hardly differ between images. At its full weight the quantizer's loss keeps them alike: the
        # codebook collapses, and the decoder draws the mean image.
        config.loss.quantizer_weight = 0.1
    config = common.finish(config, smoke=variant.startswith("smoke"))
    if variant.startswith("smoke"):  # after 150 steps the decoder only begins to use its tokens
        config.num_steps = config.recipe.num_steps = 300
        config.checkpoint_every = config.eval_every = config.preview_every = 150
        config.loss.discriminator_start = 225
        config.model.codebook_size = 128  # as in the digits' recipe
    return config
