"""Generates images from class labels: `python -m titok_jax.sample` makes a labelled grid of digits.

The images are made in batches, which are kept in OUT.shards until all are finished. After a kill, the same command makes the
missing batches and ends with the same file. If `jax.distributed` is initialised, the processes share the batches.
"""

import dataclasses
import sys
from collections.abc import Sequence

from titok_jax.inference.arguments import (
    add_precision_arguments,
    add_sampling_arguments,
    batch_size_of,
    parse_labels,
    precision_settings,
    sampling_settings,
)
from titok_jax.inference.many import balanced_labels, sample
from titok_jax.inference.sample_files import FOLDER_FILES, output_writer, write_folder, write_npz
from titok_jax.runtime.arguments import IMAGES, Parser
from titok_jax.runtime.capacity import check_space
from titok_jax.runtime.command import command
from titok_jax.runtime.locks import lock_run
from titok_jax.runtime.outputs import check_output, new_file, new_folder
from titok_jax.runtime.shards import Shards
from titok_jax.weights import published_models

_EPILOG = """examples:
  python -m titok_jax.sample
      64 digits into samples.png, a labelled grid
  python -m titok_jax.sample --labels 3,1,4 --num 30 --out pi.png
      ten images of each of three classes
  python -m titok_jax.sample --model titok_l32 --num 50000 --out samples.npz
      samples for the published evaluation: arr_0 uint8 [50000, 256, 256, 3], and labels; stop and start it at will
  python -m titok_jax.sample --num 1000 --steps 4 --guidance-scale 2 --seed 7 --out samples/
      a folder with one PNG per image, INDEX_LABEL.png, and grid.png
"""


def _parser() -> Parser:
    parser = Parser(
        prog="python -m titok_jax.sample",
        description="Generates images from class labels and writes them as a picture, a folder or an .npz file.",
        epilog=_EPILOG,
    )
    known = ", ".join(published_models.names("generator"))
    parser.add_argument(
        "--model", default="digits", help=f"name ({known}), hf://owner/name or folder of a generator (default: digits)"
    )
    parser.add_argument("--tokenizer", help="name or folder, if not the one in the generator's folder or repository")
    parser.add_argument("--revision", help="branch, tag or commit of a generator on the hub (HF_TOKEN: a token for it)")
    parser.add_argument("--tokenizer-revision", help="the same of its tokenizer, if that is in a repository of its own")
    parser.add_argument("--labels", default="all", help="classes: numbers separated by commas, or all (default: all)")
    parser.add_argument("--num", type=IMAGES, default=64, help="how many images, shared among the labels (default: 64)")
    parser.add_argument(
        "--out",
        default="samples.png",
        help="FILE.png: one picture; FILE.npz: arrays; else a folder, one PNG per image; also gs:// (default: samples.png)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the output, and unfinished work of other settings")
    add_precision_arguments(parser)
    add_sampling_arguments(parser)
    return parser


@command
def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    write = output_writer(args.out, args.num)
    folder_of = FOLDER_FILES if write is write_folder else None
    out = check_output(args.out, args.overwrite, folder_of=folder_of)
    published_models.find(args.model, "generator")  # before JAX is imported

    from titok_jax import inference
    from titok_jax.weights.model_files import pin_pair
    from titok_jax.weights.pretrained import weights_sha256

    revisions = {"revision": args.revision, "tokenizer_revision": args.tokenizer_revision}
    (model, tokenizer), revisions = pin_pair(args.model, args.tokenizer, **revisions)
    tokenizer_config, config = inference.pair_configs(model, tokenizer, **revisions)
    if tokenizer_config.predicts_codes:
        raise ValueError("the tokenizer is a stage 1 model, which predicts codes, not images; name one of stage 2")
    settings = sampling_settings(args, config)
    size = tokenizer_config.image_size
    batch_size = batch_size_of(args, args.num, size)
    # The finished batches, and all of them once more in an .npz file.
    check_space(out, (1 + (write is write_npz)) * args.num * 3 * size**2, f"--num {args.num}")
    classes = parse_labels(args.labels, config.num_classes)
    if args.labels.strip() != "all" and args.num < len(classes):
        raise ValueError(f"--num is {args.num}, but --labels names {len(classes)} classes")
    labels = balanced_labels(classes, args.num)

    import jax

    from titok_jax.runtime import processes

    processes.initialize_distributed()
    several = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    precision = precision_settings(args)
    made_with = {"labels": args.labels, "seed": args.seed} | precision | dataclasses.asdict(settings)
    made_with |= weights_sha256(model, tokenizer or model, **revisions)
    with lock_run(f"{out}.shards", temporary=True, **several):
        shards = Shards(f"{out}.shards", made_with, args.num, batch_size, restart=args.overwrite, **several)
        tokenizer, generator = inference.load_pair(model, tokenizer, mesh="local", **precision, **revisions)

        def pieces(numbers):
            options = {"batch_size": batch_size, "numbers": numbers, "sampling": settings}
            for _, _, images in sample(tokenizer, generator, labels, args.seed, **options):
                yield {"images": images}

        print(
            f"{args.model}: {config.num_classes} classes, {config.num_tokens} tokens of {config.codebook_size} codes per "
            f"image, {size}x{size} pixels\n"
            + "sampling: "
            + ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(settings).items())
            + f", seed {args.seed}\ncompiling; the first batch takes longer",
            flush=True,
        )
        print(shards.make(pieces))
        if shards.first:
            if folder_of is None:
                output = new_file(out, replace=args.overwrite)
            else:
                output = new_folder(out, files=folder_of, replace=args.overwrite, last="grid.png")
            with output as path:
                write(path, labels, ((shards.items(number), piece["images"]) for number, piece in enumerate(shards)))
            shards.remove()
            print(f"wrote {out}")
        shards.wait("written")


if __name__ == "__main__":
    sys.exit(main())
