"""Stage 1 of the two-stage tokenizers: predict the codes of the MaskGIT-VQGAN.

  python -m titok_jax.train --config configs/stage1.py:l32 --workdir runs/l32_stage1 \
      --config.data.source.paths='IMAGENET/train-*'

Variants: l32, b64, s128. As published, L-32 took 74 hours on 64 A100, B-64 41 hours on 32, and S-128 ends with a cross
entropy of about 3.0. l64_512 and b128_512 are for images of 512 x 512 pixels. For these, set --config.vqgan to a
MaskGIT-VQGAN for that size: one trained here (configs/maskgit_vqgan.py:imagenet512) or the original JAX checkpoint. `:smoke`
is a small model on the embedded digits, about a minute on a CPU. Its VQGAN has random weights, but its cross entropy still
falls from 6.9.

Values: the published configs/training/TiTok/stage1/titok_l32.yaml, titok_b64.yaml and titok_s128.yaml (batch 32 on each
of 8 GPUs), with bfloat16 instead of fp16. For 512 pixels, neither files nor weights were published. The numbers of tokens
are from the paper (arXiv 2406.07550, section 4). We assume that a patch is also 16 pixels, so the grid matches the
MaskGIT-VQGAN's 32 x 32 codes. The rest is the same.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str = "l32") -> ConfigDict:
    size, num_tokens, pixels = common.pick(common.TWO_STAGE, variant)
    config = common.base("stage1")
    config.num_steps = 1_000_000
    config.vqgan = "maskgit_vqgan" if pixels == 256 else ""
    config.token_precision = "highest"
    config.model = common.two_stage_model(size, num_tokens, pixels, finetune_decoder=False)
    config.restart_codes = False
    config.loss = ConfigDict({"quantizer_weight": 1.0})
    config.optimizer = common.optimizer(1e-4, beta2=0.99, weight_decay=1e-4, warmup_steps=10_000)
    return common.finish(common.at_size(config, pixels), smoke=variant == "smoke")
