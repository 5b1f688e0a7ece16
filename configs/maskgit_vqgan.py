"""The MaskGIT-VQGAN, trained from scratch. Stage 1 predicts the codes of this 2D tokenizer; stage 2 fine-tunes its decoder.

  python -m titok_jax.train --config configs/maskgit_vqgan.py:imagenet256 --workdir runs/vqgan \
      --config.data.source.paths='IMAGENET/train-*' --config.perceptual_weights=WEIGHTS

WEIGHTS contains convnext_small-0c510722.pth of torchvision. For stages 1 and 2, set --config.vqgan=runs/vqgan/pretrained.
Variants and rFID of the published weights: imagenet256 2.28, imagenet512 1.97. The training time was not published. `:smoke`
is a small model on the embedded digits, about a minute on a CPU, without perceptual loss.

Values: google-research/maskgit, maskgit/configs/vqgan_config.py and base_config.py (Adam without weight decay or clipping;
batch size global; float32; average 0.999). That repository does not say how training images are cropped; we crop as in
TiTok's stages. It names a warm-up of 2,000 steps beside its constant schedule, but without code for it; we use no warm-up.
The discriminator, its size and the perceptual network are also our choice (tasks/maskgit_vqgan.py).
"""

from ml_collections import ConfigDict

from configs import common

VARIANTS = {"imagenet256": 256, "imagenet512": 512, "smoke": 256}


def get_config(variant: str = "imagenet256") -> ConfigDict:
    size = common.pick(VARIANTS, variant)
    config = common.base("maskgit_vqgan")
    config.num_steps = 1_000_000
    config.compute_dtype = "float32"
    config.perceptual_weights = ""
    config.model = ConfigDict(
        {
            "hidden_channels": 128,
            "channel_mult": (1, 1, 2, 2, 4),
            "num_res_blocks": 2,
            "z_channels": 256,
            "codebook_size": 1024,
            "resolution": size,
        }
    )
    config.loss = ConfigDict(
        {
            "reconstruction": "l2",
            "commitment_weight": 0.25,
            "entropy_weight": 0.1,
            "entropy_temperature": 0.01,
            "perceptual": "convnext_s",
            "perceptual_weight": 0.1,
            "discriminator_weight": 0.1,
            "discriminator_start": 0,
            "gradient_penalty": 10.0,
            "lecam_weight": 0.0,
            "lecam_decay": 0.999,
        }
    )
    adam = {"schedule": "constant", "beta1": 0.0, "max_grad_norm": float("inf")}
    config.optimizer = common.optimizer(1e-4, beta2=0.99, weight_decay=0.0, warmup_steps=0)
    config.optimizer.update(adam)
    config.discriminator = ConfigDict({"hidden_channels": 128, "num_stages": 3, "logits_size": 16})
    config.discriminator_dtype = "float32"
    config.discriminator_optimizer = ConfigDict(config.optimizer.to_dict())
    return common.finish(common.at_size(config, size), smoke=variant == "smoke")
