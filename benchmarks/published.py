"""Runs the published PyTorch code for benchmarks/speed.py: `python published.py CLONE`.

speed.py starts this script in an interpreter with torch, for one case at a time.

Models have new weights, because the speed does not depend on them. Inference is that of the published scripts. A training
step is what the published trainer does between two batches: forward under autocast, backward, clipping, AdamW and the moving
average. Its logging is left out, because it waits for the device at every loss.
"""

import contextlib
import io
import sys

from serving import Prepared, serve


class Published:
    """The published code, imported from its clone, and what it is asked to do."""

    def __init__(self, clone: str):
        sys.path.insert(0, clone)

        import torch
        import torchvision
        from omegaconf import OmegaConf

        # Weights of other networks are not downloaded.
        for name in ("vgg16", "convnext_small"):
            make = getattr(torchvision.models, name)
            setattr(torchvision.models, name, lambda *args, make=make, **kwargs: make(weights=None))

        from modeling.maskgit import ImageBert, UViTBert
        from modeling.modules import losses
        from modeling.modules.ema_model import EMAModel
        from modeling.modules.lpips import LPIPS
        from modeling.titok import PretrainedTokenizer, TiTok

        LPIPS.load_pretrained = lambda self: None

        class NewTokenizer(PretrainedTokenizer):
            def load_state_dict(self, *args, **kwargs):
                pass

        self.clone, self.torch, self.OmegaConf, self.losses = clone, torch, OmegaConf, losses
        self.ImageBert, self.UViTBert, self.TiTok = ImageBert, UViTBert, TiTok
        self.EMAModel, self.NewTokenizer = EMAModel, NewTokenizer
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as in the published scripts

    def autocast(self, dtype):
        if dtype != "bfloat16":
            return contextlib.nullcontext()
        return self.torch.autocast(self.device.type, self.torch.bfloat16)

    def make_tokenizer(self, config):
        with self.device:
            return self.TiTok(config)

    def make_generator(self, config):
        with self.device:
            model = (self.UViTBert if config.model.generator.model_type == "UViT" else self.ImageBert)(config)
            if hasattr(model, "model"):
                # Some versions of transformers tie this layer to the embedding, which changes its size.
                model.model.lm_head = self.torch.nn.Linear(
                    config.model.generator.hidden_size, config.model.vq_model.codebook_size
                )
        return model

    def inference(self, request, dtype, batch):
        config = self.OmegaConf.create(request["tokenizer"])
        titok = self.make_tokenizer(config).eval()
        size = request["image_size"]
        if request["compile"]:
            titok.encoder, titok.decoder = self.torch.compile(titok.encoder), self.torch.compile(titok.decoder)
            if hasattr(titok, "pixel_decoder"):
                titok.pixel_decoder = self.torch.compile(titok.pixel_decoder)
        if request["kind"] == "encode":
            images = self.torch.rand(batch, 3, size, size, device=self.device)

            def call():
                return titok.encode(images)

        elif request["kind"] == "decode":
            vq = config.model.vq_model
            tokens = self.torch.randint(vq.codebook_size, (batch, 1, vq.num_latent_tokens), device=self.device)

            def call():
                return titok.decode_tokens(tokens).clamp(0, 1)

        else:
            generator = self.make_generator(self.OmegaConf.create(request["generator"])).eval()
            if request["compile"]:
                generator.forward = self.torch.compile(generator.forward)
            labels = self.torch.arange(batch, device=self.device)

            def call():
                tokens = generator.generate(condition=labels, **request["settings"])
                return titok.decode_tokens(tokens.view(batch, -1)).clamp(0, 1)

        def run():
            with self.torch.no_grad(), self.autocast(dtype):
                call()

        return run

    def training(self, request, dtype, batch):
        published = self.OmegaConf.load(f"{self.clone}/{request['recipe']}")
        config = self.OmegaConf.merge(published, self.OmegaConf.create(request["changes"]))
        is_generator = request["task"] == "generator"
        model = (self.make_generator if is_generator else self.make_tokenizer)(config).train()
        loss_class = {
            "stage1": self.losses.ReconstructionLoss_Stage1,
            "stage2": self.losses.ReconstructionLoss_Stage2,
            "single_stage": self.losses.ReconstructionLoss_Single_Stage,
            "generator": self.losses.MLMLoss,
        }[request["task"]]
        with self.device:
            loss_module = loss_class(config=config).to(self.device)
        average = self.EMAModel(model.parameters(), decay=0.999, model_cls=type(model), config=config)
        average.to(self.device)

        made = self.optimizer(config, model, config.optimizer.params.learning_rate)
        forward = self.torch.compile(model) if request["compile"] else model
        parts = (config, model, forward, made, loss_module, average, dtype, batch)
        return self.training_of_generator(*parts) if is_generator else self.training_of_tokenizer(request["task"], *parts)

    def training_of_generator(self, config, model, forward, made, loss_module, average, dtype, batch):
        seq, codes = config.model.generator.image_seq_len, config.model.vq_model.codebook_size
        tokens = self.torch.randint(codes, (batch, seq), device=self.device)
        labels = self.torch.randint(config.model.generator.condition_num_classes, (batch,), device=self.device)

        def run():
            masked, masks = model.masking_input_tokens(tokens)
            with self.autocast(dtype):
                logits = forward(masked, labels, cond_drop_prob=config.model.generator.class_label_dropout)
            self.update(config, model, made, loss_module(logits.float(), tokens, weights=masks)[0])
            average.step(model.parameters())

        return run

    def training_of_tokenizer(self, task, config, model, forward, made, loss_module, average, dtype, batch):
        gan = task in ("stage2", "single_stage")
        size = config.dataset.preprocessing.crop_size
        images = self.torch.rand(batch, 3, size, size, device=self.device)
        vqgan = None
        if task == "stage1":
            empty = io.BytesIO()
            self.torch.save({}, empty)
            empty.seek(0)
            with self.device:
                vqgan = self.NewTokenizer(empty).to(self.device)
        if gan:
            made_discriminator = self.optimizer(config, loss_module, config.optimizer.params.discriminator_learning_rate)

        def run():
            codes = vqgan.encode(images) if vqgan else None
            with self.autocast(dtype):
                reconstructed, extra = forward(images)
            reconstructed = reconstructed.float()
            if gan:
                loss = loss_module(images, reconstructed, extra, 0, mode="generator")[0]
            else:
                loss = loss_module(codes, reconstructed, extra)[0]
            self.update(config, model, made, loss)
            if gan:
                loss = loss_module(images, reconstructed, extra, global_step=0, mode="discriminator")[0]
                self.update(config, loss_module, made_discriminator, loss)
            average.step(model.parameters())

        return run

    def optimizer(self, config, module, rate):
        words = ("ln", "bias", "latent_tokens", "mask_token", "embedding", "norm", "gamma", "embed")
        groups = ([], [])
        for name, p in module.named_parameters():
            if p.requires_grad:
                groups[p.ndim >= 2 and not any(word in name for word in words)].append(p)
        params = config.optimizer.params
        return self.torch.optim.AdamW(
            [{"params": groups[0], "weight_decay": 0.0}, {"params": groups[1], "weight_decay": params.weight_decay}],
            lr=rate,
            betas=(params.beta1, params.beta2),
        )

    def update(self, config, module, made, loss):
        loss.backward()
        self.torch.nn.utils.clip_grad_norm_(module.parameters(), config.training.max_grad_norm)
        made.step()
        made.zero_grad(set_to_none=True)

    def wait(self):
        if self.device.type == "cuda":
            self.torch.cuda.synchronize()


def prepare(request) -> Prepared:
    code = Published(sys.argv[1])
    torch, cuda = code.torch, code.device.type == "cuda"
    torch.manual_seed(0)
    make = code.training if request["kind"] == "train" else code.inference
    run_once = make(request, request["dtype"], request["batch"])

    def run(times: int) -> None:
        for _ in range(times):
            run_once()
        code.wait()

    device = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    return Prepared(f"{device}, torch {torch.__version__}", run, lambda: torch.cuda.max_memory_allocated() if cuda else None)


if __name__ == "__main__":
    serve(prepare)
