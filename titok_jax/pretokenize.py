"""Turns an image data set into token records for generator training: `python -m titok_jax.pretokenize`.

The output folder contains shards `tokens-00003-of-00016.array_record` (or `.jsonl`, the published format) and
`pretokenize.json`, which records how they were made. A shard appears only when it is complete. After a kill, the same
command makes the missing shards; no record is lost or duplicated. Several processes
(processes.py: initialize_distributed) share the shards.
"""

import sys
from collections.abc import Sequence

from titok_jax.data.sources import make_source, parse_source
from titok_jax.data.token_shards import CROPS, pretokenize
from titok_jax.inference.arguments import add_precision_arguments, batch_size_of, precision_settings
from titok_jax.runtime.arguments import BATCH, MOST_SHARDS, SEED, Parser, Whole
from titok_jax.runtime.command import command, require
from titok_jax.runtime.locks import lock_run
from titok_jax.runtime.paths import as_path
from titok_jax.weights import published_models

_EPILOG = """examples:
  python -m titok_jax.pretokenize digits:train --out tokens
      the embedded training digits through the embedded tokenizer, each once: a mirrored digit is none
  python -m titok_jax.pretokenize imagenet/train --model titok_b64 --crops ten --shards 256 --out tokens
      ten crops of every image in a folder: one pass stands for ten epochs with augmentation
  python -m titok_jax.pretokenize tfds:imagenet2012:train --model titok_l32 --crops random --passes 10 --out tokens
      the training augmentation, ten times over
  python -m titok_jax.pretokenize imagenet/train --model maskgit_vqgan --format jsonl --out codes
      the 256 codes of each image row by row, as the published scripts/pretokenization.py writes them
  python -m titok_jax.train --config configs/generator.py:b64 --config.data.source.paths='tokens/*.array_record' ...
      trains on them

DATA is array_record:FILES (of tools/prepare_imagenet.py), a folder of images (class per sub-folder), tfds:NAME:SPLIT,
webdataset:FILES (a glob, or with braces as in 'imagenet-train-{0000..0252}.tar'), parquet:FILES (as on the hub, columns
image and label) or digits:SPLIT (train, held_out or all).

Crops: "center" is one center crop, "flip" that and its mirror image, "ten" the published ten crops, "random" the published
random crop and flip. The published order of "flip" (all images of a batch, then all mirrored) is another one; the records
are the same.
"""


def _parser() -> Parser:
    parser = Parser(
        prog="python -m titok_jax.pretokenize",
        description="Turns images into token records for generator training; goes on where it was stopped.",
        epilog=_EPILOG,
    )
    tokenizers = published_models.names("tokenizer") + published_models.names("vqgan")
    parser.add_argument("data", metavar="DATA", help="a folder of images, or KIND:WHERE; see below")
    parser.add_argument("--model", default="digits", help=f"tokenizer: {', '.join(tokenizers)}, folder or file")
    parser.add_argument("--revision", help="branch, tag or commit of a tokenizer on the hub (HF_TOKEN: a token for it)")
    parser.add_argument("--out", required=True, type=as_path, help="folder of the shards, also gs://; made, or continued")
    parser.add_argument("--crops", choices=CROPS, help="pictures of each image (default: flip, of digits center)")
    parser.add_argument("--passes", type=Whole(1, 10_000), default=1, help='passes over the data, for "random" (default: 1)')
    parser.add_argument("--shards", type=Whole(1, MOST_SHARDS), default=1, help="files to write (default: 1)")
    parser.add_argument("--format", choices=("array_record", "jsonl"), default="array_record", help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=BATCH, default=64, help="images at a time (default: 64)")
    parser.add_argument("--skip-damaged", action="store_true", help="leave out damaged tars of webdataset:, and name them")
    parser.add_argument("--seed", type=SEED, default=0, help='of "random" (default: 0)')
    add_precision_arguments(parser)
    return parser


@command
def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    described = parse_source(args.data)
    crops = args.crops or ("center" if described["name"] == "digits" else "flip")
    if args.passes > 1 and crops != "random":
        raise ValueError(f'--passes is {args.passes}, but --crops {crops} gives the same in every pass; use "random"')
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is a file, expected a folder")
    if args.format == "array_record":
        require("array_record")
    if args.skip_damaged:
        if described["name"] != "webdataset":
            raise ValueError(f"--skip-damaged is for webdataset:FILES, not for {args.data}")
        described["skip_damaged"] = True
    source = make_source(described)
    if args.shards > args.passes * len(source):
        raise ValueError(f"--shards is {args.shards}, more than the {args.passes * len(source)} images")

    import jax
    from jax.experimental import multihost_utils

    from titok_jax.inference.loading import load_image_config, load_image_model
    from titok_jax.runtime import processes
    from titok_jax.weights.pretrained import weights_sha256

    processes.initialize_distributed()
    config = load_image_config(args.model, revision=args.revision)
    if not config.has_tokens:
        raise ValueError(f"{args.model} is a VAE, which has no token ids; a generator needs a vq tokenizer")
    in_a_shard = -(-args.passes * len(source) // args.shards) * CROPS[crops]
    batch_size = batch_size_of(args, in_a_shard, config.image_size)
    precision = precision_settings(args)
    settings = {
        "data": args.data,
        "num_images": len(source),
        "class_names": list(getattr(source, "class_names", [])),
        "model": args.model if args.revision is None else f"{args.model}@{args.revision}",
        **precision,
        "weights": weights_sha256(None, args.model, tokenizer_revision=args.revision)["tokenizer"],
        "crops": crops,
        "passes": args.passes,
        "seed": args.seed,
        "shards": args.shards,
        "format": args.format,
    }
    several = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    with lock_run(args.out, **several):
        tokenizer = load_image_model(args.model, revision=args.revision, mesh="local", **precision)
        options = {"settings": settings, "batch_size": batch_size, **several}
        written, there = pretokenize(tokenizer, source, args.out, **options)
        print(f"wrote {written} shards of {args.out}; {there} were there")
        multihost_utils.sync_global_devices("tokenized")  # a process that ends early would end the others


if __name__ == "__main__":
    sys.exit(main())
