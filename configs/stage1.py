"""Stage 1 of the two-stage tokenizers: predict the codes of the MaskGIT-VQGAN.

  python -m titok_jax.train --config configs/stage1.py:l32 --workdir runs/l32_stage1 \
      --config.data.source.paths='IMAGENET/train-*'

Variants l32, b64, s128; published: L-32 took 74 hours on 64 A100, B-64 41 hours on 32, and S-128 ends with a cross entropy
of about 3.0. l64_512 and b128_512 are for images of 512 x 512 pixels; set --config.vqgan to a MaskGIT-VQGAN for these: one
trained here (configs/maskgit_vqgan.py:imagenet512) or the original JAX checkpoint. `:smoke` is a small one on the embedded
digits, about a minute on a CPU, whose VQGAN has random weights: its cross entropy falls from 6.9 all the same.

Values: the published configs/training/TiTok/stage1/titok_l32.yaml, titok_b64.yaml and titok_s128.yaml (batch 32 on each
of 8 GPUs). fp16 there is bfloat16 here. For 512 pixels neither files nor weights were published: the numbers of
tokens are the paper's (arXiv 2406.07550, section 4). That a patch is 16 pixels there too, so that the grid is that of the
MaskGIT-VQGAN's 32 x 32 codes, is our reading; the rest is the same.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str = "l32") -> ConfigDict:
    size, num_tokens, pixels = common.pick(common.TWO_STAGE, variant)
    config = common.base("stage1")
    config.num_steps = 1_000_000
    config.vqgan = "maskgit_vqgan" if pixels == 256 else ""
    config.model = common.two_stage_model(size, num_tokens, pixels, finetune_decoder=False)
    config.restart_codes = False
    config.loss = ConfigDict({"quantizer_weight": 1.0})
    config.optimizer = common.optimizer(1e-4, beta2=0.99, weight_decay=1e-4, warmup_steps=10_000)
    return common.finish(common.at_size(config, pixels), smoke=variant == "smoke")
