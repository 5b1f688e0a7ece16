"""Measures how the published code initialises its models: `PYTHON benchmarks/initialisation.py CLONE MASKGIT`.

CLONE and MASKGIT are clones of bytedance/1d-tokenizer and google-research/maskgit, PYTHON is an interpreter with the
requirements of both. The script runs the published constructors of the nine tokenizers, of stage 1 of the three two-stage
ones, of the three generators, the MaskGIT-VQGAN and the discriminator, one at a time, and the original one of the
MaskGIT-VQGAN's codes. It writes tests/golden/initialisation.json, with which tests/test_initialisation.py compares ours. Six
minutes on 2 CPU cores, 3 GB of memory.

The parameters of one kind of model, one shape, and one name but for the numbers of layers are a group. The file has a row
for each group: the count of its numbers, their mean, standard deviation, largest magnitude, and kurtosis (the mean of x^4
over the squared variance: 3 for a normal, 1.8 for a uniform distribution). A constant has its number instead. It is an error
if the parameters of a group have different distributions.
"""

import argparse
import gc
import io
import json
import math
import re
import sys
from pathlib import Path

# These are made again, with other seeds, until each group has so many numbers. A bias of one number shows no distribution.
AGAIN = {"tokenizer": "TiTok/titok_s128", "maskgit_vqgan": "maskgit_vqgan", "discriminator": "discriminator"}
ENOUGH = 400
SMALL = 20_000  # only parameters with fewer numbers are measured again
ODD = 6.5  # standard errors between a parameter and its group; there are 4,000 parameters
LAYERS = r"\b(transformer|layer|in_blocks|out_blocks|blocks|down|up|mid|block)\.\d+"


def group(name: str, shape) -> str:
    """The name of a parameter's group, e.g. "encoder.transformer.*.mlp.c_fc.weight [2048, 512]"."""
    return re.sub(LAYERS, r"\1.*", name) + f" {list(shape)}"


class Group:
    """The numbers of some parameters."""

    def __init__(self):
        self.parts = []  # for each parameter: count, means of x, x^2, x^3 and x^4, largest magnitude

    def add(self, array) -> None:
        x = array.double().flatten()
        self.parts.append((x.numel(), *((x**power).mean().item() for power in (1, 2, 3, 4)), x.abs().max().item()))

    @property
    def count(self) -> int:
        return sum(part[0] for part in self.parts)

    def is_zeros_or_ones(self) -> bool:
        return {part[1:] for part in self.parts} in ({(0.0,) * 5}, {(1.0,) * 5})

    def row(self, name: str) -> float | list:
        """The number of a constant; otherwise count, mean, standard deviation, largest magnitude, kurtosis."""
        if self.is_zeros_or_ones():
            return self.parts[0][1]
        mean, square, cube, fourth = (sum(part[0] * part[i] for part in self.parts) / self.count for i in (1, 2, 3, 4))
        variance = square - mean**2
        kurtosis = (fourth - 4 * mean * cube + 6 * mean**2 * square - 3 * mean**4) / variance**2
        for count, m, s, *_ in self.parts:
            if count >= 100:
                of_mean = abs(m - mean) / math.sqrt(variance / count)
                of_variance = abs((s - m**2) / variance - 1) / math.sqrt((kurtosis - 1) / count)
                if max(of_mean, of_variance) > ODD:
                    raise ValueError(f"{name}: mean {m}, variance {s - m**2} of a parameter; {mean}, {variance} of all")
        largest = max(part[5] for part in self.parts)
        return [self.count, *(float(f"{v:.6g}") for v in (mean, math.sqrt(variance), largest, kurtosis))]


class Published:
    """The constructors of the published code."""

    def __init__(self, clone: Path):
        sys.path.insert(0, str(clone))
        import torch
        from modeling.maskgit import ImageBert, UViTBert
        from modeling.modules.discriminator import NLayerDiscriminator
        from modeling.titok import PretrainedTokenizer, TiTok
        from omegaconf import OmegaConf

        class NewTokenizer(PretrainedTokenizer):
            """The MaskGIT-VQGAN as it is before its weights are read."""

            def __init__(self):
                empty = io.BytesIO()
                torch.save({}, empty)
                empty.seek(0)
                super().__init__(empty)

            def load_state_dict(self, *args, **kwargs):
                pass

        self.torch, self.load = torch, OmegaConf.load
        self.makers = {"ViT": ImageBert, "UViT": UViTBert, "tokenizer": TiTok}
        self.others = {"maskgit_vqgan": NewTokenizer, "discriminator": NLayerDiscriminator}
        folder = clone / "configs"
        self.configs = sorted((folder / "infer" / "TiTok").glob("*.yaml"))
        self.configs += sorted((folder / "training" / "TiTok" / "stage1").glob("*.yaml"))

    def models(self):
        """Yields (kind, name, constructor)."""
        for path in self.configs:
            config, name = self.load(path), f"{path.parent.name}/{path.stem}"
            if "generator" in config.model:
                kind = config.model.generator.model_type
                yield kind, name, lambda config=config, kind=kind: self.makers[kind](config)
            yield "tokenizer", name, lambda config=config: self.makers["tokenizer"](config)
        for kind, make in self.others.items():
            yield kind, kind, make


def measure(clone: Path) -> dict:
    """{kind of model: {group: row}}."""
    published = Published(clone)
    groups = {}

    def add(kind: str, make, below: float = math.inf) -> None:
        for name, parameter in make().named_parameters(remove_duplicate=False):
            if parameter.numel() < below:
                groups.setdefault(kind, {}).setdefault(group(name, parameter.shape), Group()).add(parameter.detach())
        gc.collect()

    published.torch.manual_seed(0)
    models = list(published.models())
    for kind, name, make in models:
        print(kind, name, flush=True)
        add(kind, make)
    for kind, name, make in models:
        if AGAIN.get(kind) == name:
            few = [g for g in groups[kind].values() if g.count < ENOUGH and not g.is_zeros_or_ones()]
            for again in range(ENOUGH):
                if all(g.count >= ENOUGH for g in few):
                    print(kind, "again", again, "times", flush=True)
                    break
                add(kind, make, SMALL)
    return {kind: {name: g.row(name) for name, g in sorted(of.items())} for kind, of in groups.items()}


def measure_codes(clone: Path) -> dict:
    """{group: row} of the MaskGIT-VQGAN's codes in the original JAX code."""
    sys.path.insert(0, str(clone))
    import jax
    import numpy as np
    import torch
    from maskgit.configs.vqgan_config import get_config
    from maskgit.nets.vqgan_tokenizer import VectorQuantizer

    config, codes = get_config(), Group()
    quantizer = VectorQuantizer(config, train=False)
    made = quantizer.init(jax.random.key(0), jax.numpy.zeros((1, 1, 1, config.vqvae.embedding_dim)))["params"]["codebook"]
    codes.add(torch.from_numpy(np.array(made)))
    name = group("quantize.embedding.weight", made.shape)
    return {name: codes.row(name)}


def write(measured: dict, path: Path) -> None:
    """Writes one line per group."""
    import torch
    import transformers

    lines = [f'"made with": "torch {torch.__version__}, transformers {transformers.__version__}"']
    for kind, of in measured.items():
        rows = [f"{json.dumps(name)}: {json.dumps(row)}" for name, row in of.items()]
        lines.append(f'"{kind}": {{\n' + ",\n".join(rows) + "\n}")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone", type=Path)
    parser.add_argument("maskgit", type=Path)
    out = Path(__file__).parents[1] / "tests" / "golden" / "initialisation.json"
    parser.add_argument("--out", type=Path, default=out)
    args = parser.parse_args()
    write({"maskgit_vqgan in JAX": measure_codes(args.maskgit), **measure(args.clone)}, args.out)


if __name__ == "__main__":
    main()
