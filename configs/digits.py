"""The digits model: hand-written digits of 32 x 32 pixels as 8 tokens, then a generator of those tokens.

  python -m titok_jax.train --config configs/digits.py:tokenizer --workdir runs/digits/tokenizer
  python -m titok_jax.train --config configs/digits.py:generator --workdir runs/digits/generator \
      --config.tokenizer=runs/digits/tokenizer/pretrained

or both by `make digits`. On 2 CPU cores they take minutes each. Expect a classifier to recognise more than 95 % of the
reconstructed held-out digits and of the generated digits correctly (measured figures: README.md).

`:smoke_tokenizer` and `:smoke_generator` run the same for a few steps, to test that everything works.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str = "tokenizer") -> ConfigDict:
    variants = {"tokenizer": tokenizer, "generator": generator}
    make = common.pick(variants | {f"smoke_{name}": make for name, make in variants.items()}, variant)
    config = make()
    if variant.startswith("smoke_"):
        config.num_steps = 30
        config.data.batch_size = 32
        config.optimizer.warmup_steps = 5
        config.log_every = 10
        config.checkpoint_every = 15
        config.eval_every = 30
        config.preview_every = 30
    return common.finish(config, smoke=False)


def base() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.data = ConfigDict(
        {
            "source": {"name": "digits", "split": "train"},
            "eval_source": {"name": "digits", "split": "test"},
            "transform": {"name": "jitter"},
            "batch_size": 128,
            "num_workers": 0,
            "num_threads": 2,
            "read_ahead_mib": 1024,
        }
    )
    config.scale_with_batch = False
    config.ema_decay = 0.999
    config.ema_ramp = True
    config.compute_dtype = "float32"
    config.remat, config.scan_layers = "none", "auto"
    config.gradient_accumulation = 1
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1, "dcn_data": -1})
    config.log_every, config.log_grad_norms = 100, False
    config.checkpoint_every = 1000
    config.keep_checkpoints = 2
    config.eval_every = 500
    config.eval_images = 360
    config.max_nonfinite_steps = 20
    config.compile_effort = 0.0
    config.watchdog_minutes = 30.0
    config.preview_every = 1000
    config.preview_images = 40
    config.preview_columns = 10
    return config


def tokenizer() -> ConfigDict:
    config = base()
    config.task = "single_stage"
    config.num_steps = 2500
    config.model = ConfigDict(
        {
            "image_size": 32,
            "patch_size": 8,
            "num_latent_tokens": 8,
            "token_size": 8,
            "codebook_size": 128,
            "use_l2_norm": False,
            "quantize_mode": "vq",
            "encoder": {"width": 96, "num_layers": 2, "num_heads": 3},
            "decoder": {"width": 96, "num_layers": 2, "num_heads": 3},
            "is_legacy": False,
            "finetune_decoder": False,
        }
    )
    config.loss = ConfigDict(
        {"reconstruction": "l2", "quantizer_weight": 1.0, "perceptual": "none", "discriminator_weight": 0.0}
    )
    config.optimizer = common.optimizer(1e-3, beta2=0.99, weight_decay=1e-4, warmup_steps=200)
    return config


def generator() -> ConfigDict:
    config = base()
    config.task = "generator"
    config.tokenizer, config.token_precision = "digits", "highest"
    config.num_steps = 2500
    config.model = ConfigDict(
        {
            "model_type": "ViT",
            "num_classes": 10,
            "hidden_size": 128,
            "num_layers": 4,
            "num_heads": 4,
            "intermediate_size": 512,
            "dropout": 0.1,
            "attn_dropout": 0.1,
            "class_label_dropout": 0.1,
            "sampling": {
                "num_steps": 8,
                "guidance_scale": 3.0,
                "guidance_schedule": "linear",
                "guidance_scale_pow": 3.0,
                "temperature": 1.0,
                "softmax_temperature_annealing": True,
            },
        }
    )
    config.loss = ConfigDict({"label_smoothing": 0.1, "unmasked_weight": 0.1})
    config.optimizer = common.optimizer(1e-3, beta2=0.96, weight_decay=0.03, warmup_steps=200)
    return config
