"""Stage 2 of the two-stage tokenizers: fine-tune the decoder on pixels, against a discriminator from step 20,000 on.

  python -m titok_jax.train --config configs/stage2.py:l32 --workdir runs/l32_stage2 \
      --config.data.source.paths='IMAGENET/train-*' --config.init_from=runs/l32_stage1/pretrained \
      --config.perceptual_weights=WEIGHTS

WEIGHTS contains convnext_small-0c510722.pth of torchvision. Variants: l32, b64, s128; published rFID: 2.21, 1.70, 1.71.
l64_512 and b128_512 (published 1.77, 1.52) are for 512 x 512 pixels; set --config.vqgan as in configs/stage1.py. `:smoke` is
a small model on the embedded digits, about a minute on a CPU, without perceptual loss and from random weights.

Values: the published configs/training/TiTok/stage2/titok_l32.yaml, titok_b64.yaml and titok_s128.yaml (batch 32 on
each of 8 GPUs), with bfloat16 instead of fp16. For 512 pixels, see configs/stage1.py. There, the discriminator outputs twice
as many logits along each side, which is our choice.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str = "l32") -> ConfigDict:
    size, num_tokens, pixels = common.pick(common.TWO_STAGE, variant)
    config = common.base("stage2")
    config.num_steps = 500_000
    config.vqgan = "maskgit_vqgan" if pixels == 256 else ""
    config.perceptual_weights = ""
    config.model = common.two_stage_model(size, num_tokens, pixels, finetune_decoder=True)
    config.loss = ConfigDict(
        {
            "reconstruction": "l2",
            "reconstruction_weight": 1.0,
            "quantizer_weight": 0.0,
            "perceptual": "convnext_s",
            "perceptual_weight": 0.1,
            "discriminator_weight": 0.01,
            "discriminator_factor": 1.0,
            "discriminator_start": 20_000,
            "lecam_weight": 0.001,
            "lecam_decay": 0.999,
        }
    )
    config.optimizer = common.optimizer(1e-4, beta2=0.999, weight_decay=1e-4, warmup_steps=5_000)
    config.discriminator = ConfigDict({"hidden_channels": 128, "num_stages": 3, "logits_size": 16})
    config.discriminator_dtype = "float32"
    config.discriminator_optimizer = common.optimizer(1e-4, beta2=0.999, weight_decay=1e-4, warmup_steps=5_000)
    if variant == "smoke":
        config.init_from = "random"
    return common.finish(common.at_size(config, pixels), smoke=variant == "smoke")
