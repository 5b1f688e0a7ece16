"""Runs the published PyTorch code for benchmarks/speed.py: `python published.py CLONE`.

speed.py starts this script in an interpreter with torch. The script reads requests as lines of JSON, and writes each answer
as a line of JSON after a marker.

Models have new weights, because the speed does not depend on them. Inference is that of the published scripts. A training
step is what the published trainer does between two batches: forward under autocast, backward, clipping, AdamW and the moving
average. Its logging is left out, because it waits for the device at every loss.
"""

import contextlib
import gc
import io
import json
import sys
import time

ANSWER = "@answer "


def main() -> None:
    clone = sys.argv[1]
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

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as in the published scripts

    def autocast(dtype):
        return torch.autocast(device.type, torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext()

    def make_tokenizer(config):
        with device:
            return TiTok(config)

    def make_generator(config):
        with device:
            model = (UViTBert if config.model.generator.model_type == "UViT" else ImageBert)(config)
            if hasattr(model, "model"):
                # Some versions of transformers tie this layer to the embedding, which changes its size.
                model.model.lm_head = torch.nn.Linear(
                    config.model.generator.hidden_size, config.model.vq_model.codebook_size
                )
        return model

    def inference(request, dtype, batch):
        config = OmegaConf.create(request["tokenizer"])
        titok = make_tokenizer(config).eval()
        size = request["image_size"]
        if request["compile"]:
            titok.encoder, titok.decoder = torch.compile(titok.encoder), torch.compile(titok.decoder)
            if hasattr(titok, "pixel_decoder"):
                titok.pixel_decoder = torch.compile(titok.pixel_decoder)
        if request["kind"] == "encode":
            images = torch.rand(batch, 3, size, size, device=device)

            def call():
                return titok.encode(images)

        elif request["kind"] == "decode":
            vq = config.model.vq_model
            tokens = torch.randint(vq.codebook_size, (batch, 1, vq.num_latent_tokens), device=device)

            def call():
                return titok.decode_tokens(tokens).clamp(0, 1)

        else:
            generator = make_generator(OmegaConf.create(request["generator"])).eval()
            if request["compile"]:
                generator.forward = torch.compile(generator.forward)
            labels = torch.arange(batch, device=device)

            def call():
                tokens = generator.generate(condition=labels, **request["settings"])
                return titok.decode_tokens(tokens.view(batch, -1)).clamp(0, 1)

        def run():
            with torch.no_grad(), autocast(dtype):
                call()

        return run

    def training(request, dtype, batch):
        published = OmegaConf.load(f"{clone}/{request['recipe']}")
        config = OmegaConf.merge(published, OmegaConf.create(request["changes"]))
        is_generator, gan = request["task"] == "generator", request["task"] in ("stage2", "single_stage")
        model = (make_generator if is_generator else make_tokenizer)(config).train()
        loss_class = {
            "stage1": losses.ReconstructionLoss_Stage1,
            "stage2": losses.ReconstructionLoss_Stage2,
            "single_stage": losses.ReconstructionLoss_Single_Stage,
            "generator": losses.MLMLoss,
        }[request["task"]]
        with device:
            loss_module = loss_class(config=config).to(device)
        average = EMAModel(model.parameters(), decay=0.999, model_cls=type(model), config=config)
        average.to(device)

        def optimizer(module, rate):
            words = ("ln", "bias", "latent_tokens", "mask_token", "embedding", "norm", "gamma", "embed")
            groups = ([], [])
            for name, p in module.named_parameters():
                if p.requires_grad:
                    groups[p.ndim >= 2 and not any(word in name for word in words)].append(p)
            params = config.optimizer.params
            return torch.optim.AdamW(
                [{"params": groups[0], "weight_decay": 0.0}, {"params": groups[1], "weight_decay": params.weight_decay}],
                lr=rate,
                betas=(params.beta1, params.beta2),
            )

        def update(module, made, loss):
            loss.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), config.training.max_grad_norm)
            made.step()
            made.zero_grad(set_to_none=True)

        made = optimizer(model, config.optimizer.params.learning_rate)
        forward = torch.compile(model) if request["compile"] else model
        if is_generator:
            seq, codes = config.model.generator.image_seq_len, config.model.vq_model.codebook_size
            tokens = torch.randint(codes, (batch, seq), device=device)
            labels = torch.randint(config.model.generator.condition_num_classes, (batch,), device=device)

            def run():
                masked, masks = model.masking_input_tokens(tokens)
                with autocast(dtype):
                    logits = forward(masked, labels, cond_drop_prob=config.model.generator.class_label_dropout)
                update(model, made, loss_module(logits.float(), tokens, weights=masks)[0])
                average.step(model.parameters())

            return run

        size = config.dataset.preprocessing.crop_size
        images = torch.rand(batch, 3, size, size, device=device)
        vqgan = None
        if request["task"] == "stage1":
            empty = io.BytesIO()
            torch.save({}, empty)
            empty.seek(0)
            with device:
                vqgan = NewTokenizer(empty).to(device)
        if gan:
            made_discriminator = optimizer(loss_module, config.optimizer.params.discriminator_learning_rate)

        def run():
            codes = vqgan.encode(images) if vqgan else None
            with autocast(dtype):
                reconstructed, extra = forward(images)
            reconstructed = reconstructed.float()
            if gan:
                loss = loss_module(images, reconstructed, extra, 0, mode="generator")[0]
            else:
                loss = loss_module(codes, reconstructed, extra)[0]
            update(model, made, loss)
            if gan:
                loss = loss_module(images, reconstructed, extra, global_step=0, mode="discriminator")[0]
                update(loss_module, made_discriminator, loss)
            average.step(model.parameters())

        return run

    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize()

    run = None
    answers = sys.stdout
    sys.stdout = sys.stderr  # so that prints of the published code do not mix with the answers
    device_name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(ANSWER + json.dumps({"torch": torch.__version__, "device": device_name}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "make" in request:
                run = None
                gc.collect()
                torch.cuda.empty_cache()
                make = training if request["kind"] == "train" else inference
                torch.manual_seed(0)
                run = make(request, request["dtype"], request["make"])
                run()
                wait()
                answer = {}
            else:
                wait()
                began = time.perf_counter()
                for _ in range(request["run"]):
                    run()
                wait()
                answer = {"seconds": time.perf_counter() - began}
        except Exception as error:  # the published code, torch and its compiler may raise anything
            lines = str(error).strip().splitlines()
            answer = {"error": f"{type(error).__name__}: {lines[0] if lines else ''}"}
        print(ANSWER + json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
