"""Measures the speed on this machine, alone or compared with the published PyTorch code: `python benchmarks/speed.py`.

It times encoding, decoding, sampling (published settings, labels to pixels) and training steps at full size, with inputs on
the device. With --reference, a second process runs the same with the published code on the same device. The two take turns
for several rounds, and the table shows medians and their ratio. On a GPU, inference in float32 multiplies in TF32 on both
sides, as the published scripts do; bfloat16 means autocast in the published code. Weights are new, which does not change the
speed. Steps with a discriminator include the updates of the model and of the discriminator.
"""

import contextlib
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from published import ANSWER
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # to find the configurations from any current folder

from titok_jax.evaluation.comparison import check_clone, reference_environment
from titok_jax.runtime.arguments import BATCH, Parser, Whole
from titok_jax.runtime.command import command
from titok_jax.runtime.outputs import check_output, new_file
from titok_jax.training.recipes import read_config

_EPILOG = """examples:
  python benchmarks/speed.py
      everything, on what JAX finds
  python benchmarks/speed.py --only sample --dtype bfloat16
      the three samplers
  python benchmarks/speed.py --reference 1d-tokenizer --reference-python reference/bin/python --json speed.json
      beside the published code: a clone of bytedance/1d-tokenizer, and an interpreter with its requirements
  python benchmarks/speed.py --reference 1d-tokenizer --torch-compile
      the published code under torch.compile too
"""


class Case(NamedTuple):
    """A case to measure.

    Attributes:
      kind: "encode", "decode", "sample" or "train".
      model: a name in the zoo, or a recipe TASK:VARIANT.
      batches: batch sizes, (on a CPU, on other devices).
      recipe: for training, the configuration file of the published trainer.
      changes: changes to that file that make it equal to our recipe.
    """

    kind: str
    model: str
    batches: tuple[int, int]
    recipe: str | None = None
    changes: Mapping[str, Any] | None = None

    @property
    def name(self) -> str:
        return f"{self.kind} {self.model}"


_GAN = {"losses": {"discriminator_start": 0}}  # both updates from the first step
_GENERATOR = "configs/training/generator/maskgit.yaml"
_GENERATOR_L32 = {"model": {"vq_model": {"num_latent_tokens": 32}}}
_GENERATOR_S128 = {
    "model": {
        "vq_model": {"num_latent_tokens": 128},
        "generator": {"model_type": "UViT", "hidden_size": 1024, "num_hidden_layers": 20, "intermediate_size": 4096},
    }
}
_SINGLE_STAGE = "configs/training/TA-TiTok/tatitok_bl64_vq.yaml"

# Training uses the published batch sizes per GPU.
CASES = (
    *(Case(kind, f"titok_{name}", (4, 64)) for name in ("l32", "s128", "bl64_vq8k") for kind in ("encode", "decode")),
    *(Case("sample", f"titok_{name}", (4, 64)) for name in ("l32", "b64", "s128")),
    Case("train", "stage1:l32", (2, 32), "configs/training/TiTok/stage1/titok_l32.yaml"),
    Case("train", "stage1:b64", (2, 32), "configs/training/TiTok/stage1/titok_b64.yaml"),
    Case("train", "stage2:l32", (2, 32), "configs/training/TiTok/stage2/titok_l32.yaml", _GAN),
    Case(
        "train", "single_stage:bl64_vq8k", (2, 32), _SINGLE_STAGE, _GAN | {"dataset": {"preprocessing": {"crop_size": 256}}}
    ),
    Case("train", "generator:l32", (8, 64), _GENERATOR, _GENERATOR_L32),
    Case("train", "generator:s128", (4, 64), _GENERATOR, _GENERATOR_S128),
    Case("train", "maskgit_vqgan:imagenet256", (2, 16)),
)


def _new(tree: Any, *, scale: float) -> Any:
    """New arrays with the shapes and shardings of a tree: floats from Normal(0, scale), random integers in 0..255."""
    import jax
    import jax.numpy as jnp

    def make(x):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return jax.random.randint(jax.random.key(0), x.shape, 0, 256, jnp.int32).astype(x.dtype)
        return jax.random.normal(jax.random.key(0), x.shape, x.dtype) * scale

    shardings = jax.tree.map(lambda x: x.sharding, tree)
    return jax.jit(lambda: jax.tree.map(make, tree), out_shardings=shardings)()


def ours(case: Case, dtype: str, batch: int) -> Callable[[int], None]:
    """Prepares a case with titok_jax. Returns a function that runs it a number of times and waits for the last result."""
    import jax
    import jax.numpy as jnp

    from titok_jax import inference, models
    from titok_jax.weights import known_models

    key = jax.random.key(0)
    if case.kind == "train":
        from titok_jax.compiler.programs import training_step
        from titok_jax.runtime.sharding import on_mesh
        from titok_jax.training.settings import parse_settings

        task, variant = case.model.split(":")
        config = read_config(str(Path(__file__).parents[1] / "configs" / f"{task}.py") + f":{variant}", [])
        config.data.batch_size, config.compute_dtype = batch, dtype
        if "discriminator_start" in config.loss:
            config.loss.discriminator_start = 0
        program = training_step(case.name, parse_settings(config, abstract=True), jax.devices()[:1])
        state, frozen, examples, _ = program.args
        zeros = jax.tree.map(lambda x: jax.device_put(jnp.zeros(x.shape, x.dtype), x.sharding), state)
        held = [zeros | {"params": _new(state["params"], scale=0.02)}]
        frozen, examples = _new(frozen, scale=0.02), _new(examples, scale=0.0)
        del zeros

        def run(times: int) -> None:
            with on_mesh(program.mesh):
                for _ in range(times):
                    held[0], metrics = program.function(held[0], frozen, examples, key)
                jax.block_until_ready((held[0], metrics))

        return run

    known = known_models.known_configs()

    def load(cls, kind):
        config = known[kind, case.model]
        return cls(config, jax.jit(lambda key: models.init(config, key))(key), dtype=dtype)

    tokenizer = load(inference.Tokenizer, "tokenizer")
    config = tokenizer.config
    if case.kind == "encode":
        images = jax.random.uniform(key, (batch, config.image_size, config.image_size, 3))

        def call():
            return tokenizer.encode(images)

    elif case.kind == "decode":
        tokens = jax.random.randint(key, (batch, config.num_latent_tokens), 0, config.codebook_size)

        def call():
            return tokenizer.decode(tokens)

    else:
        generator = load(inference.Generator, "generator")
        labels = jnp.arange(batch)

        def call():
            return tokenizer.decode(inference.generate(generator, labels, key))

    def run(times: int) -> None:
        for _ in range(times):
            out = call()
        jax.block_until_ready(out)

    return run


class Published:
    """A process that runs the published code. `log` gets its output, except for its answers."""

    def __init__(self, clone: Path, python: str, log: Path):
        arguments = [python, str(Path(__file__).with_name("published.py")), str(clone.resolve())]
        self.log = log
        with log.open("w") as file:
            self._process = subprocess.Popen(
                arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True, env=reference_environment()
            )
        self.about = self._answer()

    def _answer(self) -> dict[str, Any]:
        for line in self._process.stdout:
            if line.startswith(ANSWER):
                return json.loads(line.removeprefix(ANSWER))
        said = "\n  ".join(self.log.read_text(errors="replace").strip().splitlines()[-15:])
        raise ValueError(f"the published code ended with status {self._process.wait()}; it said:\n  {said}")

    def _ask(self, **request) -> None:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()

    def make(self, case: Case, dtype: str, batch: int, *, compiled: bool) -> None:
        """Asks the process to prepare a case and run it once. `made` waits until it has."""
        from titok_jax.weights import known_models

        request: dict[str, Any] = {"make": batch, "kind": case.kind, "dtype": dtype, "compile": compiled}
        if case.kind == "train":
            request |= {"task": case.model.split(":")[0], "recipe": case.recipe, "changes": case.changes or {}}
        else:
            known = known_models.known_configs()
            tokenizer = known["tokenizer", case.model]
            request |= {"tokenizer": tokenizer.to_published(), "image_size": tokenizer.image_size}
            if case.kind == "sample":
                config = known["generator", case.model]
                settings = config.sampling
                request |= {
                    "generator": config.to_published(),
                    "settings": {
                        "guidance_scale": settings.guidance_scale,
                        "guidance_decay": settings.guidance_schedule,
                        "randomize_temperature": settings.temperature,
                        "softmax_temperature_annealing": settings.softmax_temperature_annealing,
                        "num_sample_steps": settings.num_steps,
                    },
                }
        self._ask(**request)

    def made(self) -> str | None:
        """Waits until the case is prepared. Returns None, or the reason why it cannot run."""
        return self._answer().get("error")

    def run(self, times: int) -> float:
        """Runs the case `times` times. Returns the seconds that this took."""
        self._ask(run=times)
        answer = self._answer()
        if "error" in answer:
            raise ValueError(f"the published code: {answer['error']}")
        return answer["seconds"]

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def seconds(run: Callable[[int], None], times: int) -> float:
    began = time.perf_counter()
    run(times)
    return time.perf_counter() - began


def measure(case: Case, dtype: str, batch: int, published: Published | None, rounds: int, compiled: bool) -> dict[str, Any]:
    """Measures a case. Returns its row: seconds per batch in every round, or the error, for each side."""
    import jax

    row: dict[str, Any] = {"case": case.name, "dtype": dtype, "batch": batch, "titok_jax": []}
    sides = []
    if published and (case.kind != "train" or case.recipe):
        sides = ["published"] + ["compiled"] * compiled
        published.make(case, dtype, batch, compiled=False)  # while ours is compiled
    try:
        run = ours(case, dtype, batch)
        run(2)
    except jax.errors.JaxRuntimeError as error:  # out of memory, say
        row["titok_jax_error"] = str(error).splitlines()[0]
        if sides:
            published.made()
        return row
    # Each measurement takes half a second, so the resolution of the clock does not matter.
    times = max(1, min(100, round(0.5 / seconds(run, 1))))
    for side in sides:
        if side == "compiled":
            published.make(case, dtype, batch, compiled=True)
        error = published.made()
        if error:
            row[f"{side}_error"] = error
            continue
        published.run(2)
        row[side] = []
        for _ in range(rounds):
            row["titok_jax"].append(seconds(run, times) / times)
            row[side].append(published.run(times) / times)
    if not row["titok_jax"]:
        row["titok_jax"] = [seconds(run, times) / times for _ in range(rounds)]
    return row


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Formats the rows as a Markdown table: milliseconds per batch (medians over the rounds), and ratios of medians."""
    lines = [
        "| what | dtype | batch | titok_jax | images/s | published | ratio | published, torch.compile | ratio |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        if not row["titok_jax"]:
            lines.append(f"| {row['case']} | {row['dtype']} | {row['batch']} | failed |  |  |  |  |  |")
            continue
        median = statistics.median(row["titok_jax"])
        rate = row["batch"] / median
        rate = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2f}"
        cells = [row["case"], row["dtype"], str(row["batch"]), f"{1e3 * median:.1f} ms", rate]
        for side in ("published", "compiled"):
            if row.get(side):
                other = statistics.median(row[side])
                cells += [f"{1e3 * other:.1f} ms", f"{other / median:.2f}"]
            else:
                cells += ["failed" if f"{side}_error" in row else "", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _parser() -> Parser:
    parser = Parser(description=__doc__, epilog=_EPILOG)
    parser.add_argument(
        "--only", nargs="+", metavar="TEXT", help="cases whose name has one of these texts in it, in their order"
    )
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], help="default: float32 on a CPU, else both")
    parser.add_argument("--batch", type=BATCH, help="images at a time (default: a case's own)")
    parser.add_argument("--rounds", type=Whole(1, 1000), default=5, help="medians over so many (default: 5)")
    parser.add_argument("--reference", type=Path, metavar="CLONE", help="clone of the published PyTorch repository")
    parser.add_argument("--reference-python", metavar="PYTHON", help="interpreter with its requirements (default: this one)")
    parser.add_argument("--torch-compile", action="store_true", help="the published code compiled too; takes minutes")
    parser.add_argument("--json", metavar="FILE", help="write all times here, too")
    parser.add_argument("--overwrite", action="store_true", help="FILE may exist")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    cases = {case.name: case for text in args.only or [""] for case in CASES if text in case.name}
    if not cases:
        raise ValueError(f"--only {' '.join(args.only)}: no case has that in its name; --list prints them")
    if args.list:
        print("\n".join(cases))
        return
    if args.reference is not None:
        check_clone(args.reference)
    if args.reference is None and (args.reference_python or args.torch_compile):
        raise ValueError("--reference-python and --torch-compile need --reference CLONE")
    if args.json:
        check_output(args.json, args.overwrite)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU is shared with the published code

    import jax

    device = jax.devices()[0]
    on_cpu = device.platform == "cpu"
    dtypes = args.dtype or (["float32"] if on_cpu else ["float32", "bfloat16"])
    rows = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="titok_speed_")))
        published = None
        about = f"{device.device_kind}, {os.cpu_count()} CPU cores, jax {jax.__version__}"
        if args.reference is not None:
            published = Published(args.reference, args.reference_python or sys.executable, folder / "log")
            stack.callback(published.close)
            about += f"; published code: {published.about['device']}, torch {published.about['torch']}"
        print(about)
        for case in (progress := tqdm(cases.values(), unit="case")):
            for dtype in dtypes:
                progress.set_description(f"{case.name}, {dtype}")
                batch = args.batch or case.batches[0 if on_cpu else 1]
                rows.append(measure(case, dtype, batch, published, args.rounds, args.torch_compile))
                progress.write(table(rows[-1:]).splitlines()[-1])
                if args.json:
                    with new_file(args.json, replace=args.overwrite or len(rows) > 1) as partial:
                        partial.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
                gc.collect()
                jax.clear_caches()
    for row in rows:
        for side in ("titok_jax", "published", "compiled"):
            if f"{side}_error" in row:
                print(f"{row['case']}, {row['dtype']}, {side}: {row[f'{side}_error']}")
    print(table(rows))


if __name__ == "__main__":
    sys.exit(main())
