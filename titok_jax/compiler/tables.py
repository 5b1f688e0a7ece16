"""The programs in docs/tpu.md, and its two tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from titok_jax.compiler.slices import SLICES, slice_chip

_REMAT, _FSDP8, _FSDP16 = "--config.remat=full", "--config.mesh.fsdp=8", "--config.mesh.fsdp=16"
_BATCH = "--config.data.batch_size={}".format
_ACCUMULATION = "--config.gradient_accumulation={}".format
_LOWEST = "--effort=-1"
Row = tuple[str, str, tuple[str, ...]]  # recipe or sampler, slice, options

# Programs that are compiled with the effort of their recipe, enough for a meaningful time estimate.
TIMED: tuple[Row, ...] = (
    ("configs/generator.py:l32", "v5e-16", ()),
    ("configs/generator.py:b64", "v4-32", ()),
    ("configs/generator.py:l32", "v5p-32", ()),
    ("configs/generator.py:s128", "v5p-32", ()),
    ("configs/generator.py:l64_512", "v5p-32", ()),
    ("configs/generator.py:l32", "v6e-64", ()),
    ("configs/generator.py:l32", "v6e-256", ()),
    ("configs/generator.py:l32", "v6e-256", (_BATCH(8192),)),
    ("configs/generator.py:l32", "v5e-256", (_BATCH(8192),)),
    ("configs/generator.py:l32", "2xv5e-256", (_BATCH(16384),)),
    ("configs/generator.py:l32", "v5p-128", (_FSDP8,)),
    ("configs/generator.py:l32", "v5p-256", ("--config.mesh.fsdp=2", _BATCH(8192))),
    ("titok_l32", "v5e-16", ()),
    ("titok_b64", "v6e-64", ()),
    ("titok_s128", "v5p-32", ()),
    ("configs/stage1.py:l32", "v5e-16", (_REMAT,)),
    ("configs/stage1.py:l32", "v5e-16", (_REMAT, _FSDP16)),
    ("configs/stage1.py:l32", "v4-8", (_REMAT, _ACCUMULATION(4))),
    ("configs/stage1.py:l32", "v5p-32", ()),
    ("configs/stage1.py:b64", "v4-32", ()),
    ("configs/stage1.py:s128", "v5e-16", ()),
    ("configs/maskgit_vqgan.py:imagenet256", "v5e-16", ()),
    ("configs/maskgit_vqgan.py:imagenet256", "v5p-32", ()),
    ("configs/stage2.py:l32", "v5e-16", (_REMAT, "--config.mesh.fsdp=2")),
    ("configs/stage2.py:b64", "v5e-16", (_REMAT,)),
    *((f"configs/stage2.py:{variant}", "v5p-32", ()) for variant in ("l32", "b64", "s128")),
    ("configs/single_stage.py:bl64_vq8k", "v5e-16", (_REMAT, _ACCUMULATION(2))),
    *(
        (f"configs/single_stage.py:{variant}", "v5p-32", ())
        for variant in ("bl64_vq8k", "bl128_vq8k", "sl256_vq8k", "ll32_vae", "bl64_vae", "bl128_vae")
    ),
)

# Every recipe for 256 pixels and every sampler is compiled for each of these slices.
ALL_SLICES = ("v4-32", "v5e-16", "v5p-32", "v6e-64", "v6e-256")
_SINGLE_STAGE = {"v4-32": (_REMAT,), "v5e-16": (_REMAT, _ACCUMULATION(2))}

# {program: {slice: options that the program needs there}}
EVERYWHERE: dict[str, dict[str, tuple[str, ...]]] = {
    "configs/maskgit_vqgan.py:imagenet256": {},
    "configs/stage1.py:l32": {"v4-32": (_REMAT,)},
    "configs/stage1.py:b64": {"v5e-16": (_REMAT,)},
    "configs/stage1.py:s128": {},
    "configs/stage2.py:l32": {"v4-32": (_REMAT,)},
    "configs/stage2.py:b64": {},
    "configs/stage2.py:s128": {"v5e-16": (_REMAT,)},
    **{
        f"configs/single_stage.py:{variant}": _SINGLE_STAGE
        for variant in ("bl64_vq8k", "bl128_vq8k", "sl256_vq8k", "bl64_vae", "bl128_vae")
    },
    "configs/single_stage.py:ll32_vae": {"v4-32": (_REMAT,), "v5e-16": (_REMAT, "--config.mesh.fsdp=2")},
    "configs/generator.py:l32": {},
    "configs/generator.py:b64": {"v5e-16": (_REMAT,)},
    "configs/generator.py:s128": {"v4-32": (_REMAT,), "v5e-16": (_REMAT,)},
    "titok_l32": {},
    "titok_b64": {},
    "titok_s128": {},
}

# The recipes for 512 pixels on one slice, and the smallest slice in docs/tpu.md. For 512 pixels, the VQGAN is set to the
# published one, which has the same sizes.
_VQGAN = "--config.vqgan=maskgit_vqgan"
OTHERS: tuple[Row, ...] = (
    ("configs/maskgit_vqgan.py:imagenet512", "v5p-32", (_LOWEST,)),
    ("configs/stage1.py:l64_512", "v5p-32", (_VQGAN, _REMAT, _LOWEST)),
    ("configs/stage1.py:b128_512", "v5p-32", (_VQGAN, _REMAT, _LOWEST)),
    ("configs/stage2.py:l64_512", "v5p-32", (_VQGAN, _REMAT, _LOWEST)),
    ("configs/stage2.py:b128_512", "v5p-32", (_VQGAN, _REMAT, _LOWEST)),
    ("configs/generator.py:b128_512", "v5p-32", (_REMAT, _LOWEST)),
    ("configs/stage2.py:l32", "v4-8", (_REMAT, _ACCUMULATION(4), _LOWEST)),
    ("configs/stage2.py:b64", "v4-8", (_REMAT, _ACCUMULATION(4), _LOWEST)),
    ("configs/single_stage.py:bl64_vq8k", "v4-8", (_REMAT, _ACCUMULATION(4), _LOWEST)),
)
_timed = {(what, slice_name) for what, slice_name, _ in TIMED}
TABLE: tuple[Row, ...] = (
    *TIMED,
    *(
        (what, slice_name, (*options.get(slice_name, ()), _LOWEST))
        for what, options in EVERYWHERE.items()
        for slice_name in ALL_SLICES
        if (what, slice_name) not in _timed
    ),
    *OTHERS,
)


def fits(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of memory and bytes sent, with a line for each program and a column for each slice."""
    slices = [name for name in SLICES if any(row["slice"] == name for row in rows)]
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        name, *changes = row["name"].removeprefix("sample ").split(" ")
        if "flops" in row:
            cell = f"{row['total_bytes'] / 2**30:.1f} GiB"
            cell += f", {row['sent_bytes'] / 1e9:.1f} GB" if row["sent_bytes"] else ""
            cell += "".join(f", `{change}`" for change in changes)
        else:
            cell = row["problems"][0]
        line = lines.setdefault(f"sample {name}" if row["name"].startswith("sample ") else name, {})
        line[row["slice"]] = "; ".join([line[row["slice"]], cell]) if row["slice"] in line else cell
    head = ["| program | " + " | ".join(slices) + " |", "|---" * (1 + len(slices)) + "|"]
    return "\n".join(
        head + [f"| `{name}` | {' | '.join(line.get(s, '') for s in slices)} |" for name, line in lines.items()]
    )


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Formats the rows as a Markdown table."""
    lines = [
        "| program | slice | mesh | batch | memory GiB (arguments + temporaries) | TFLOP | collectives: MB made (number) "
        "| effort | estimate ms | of peak | compile s | date |",
        "|---|---|---|--:|--:|--:|---|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        mesh = ", ".join(f"{axis} {size}" for axis, size in row["mesh"].items()) or "one device"
        start = f"| `{row['name']}` | {row['slice']} | {mesh} | {row['batch_size']} | "
        if "flops" not in row:
            lines.append(start + f"{row['problems'][0]} | | | | | | | |")
            continue
        collectives = ", ".join(
            f"{kind} {row['collective_bytes'][kind] / 1e6:,.0f} ({row['collective_count'][kind]:.0f})"
            for kind in sorted(row["collective_bytes"])
        )
        estimate = "none | "
        if row["estimated_seconds"] is not None:
            peak = row["flops"] / (row["estimated_seconds"] * slice_chip(row["slice"]).tflops * 1e12)
            estimate = f"{row['estimated_seconds'] * 1e3:.1f} | {peak:.0%}"
        lines.append(
            start + f"{row['total_bytes'] / 2**30:.1f} ({row['argument_bytes'] / 2**30:.1f} + "
            f"{row['temporary_bytes'] / 2**30:.1f}) | {row['flops'] / 1e12:.2f} | {collectives or 'none'} | "
            f"{row['effort']:g} | {estimate} | {row['compile_seconds']:.0f} | {row.get('date', '')} |"
        )
    return "\n".join(lines)


def row_name(what: str, options: Sequence[str] = ()) -> str:
    """The name in the table of a sampler, or of a recipe with the configuration changes in `options`."""
    if not what.startswith("configs/"):
        return f"sample {what}"
    changes = [option.removeprefix("--config.") for option in options if option.startswith("--config.")]
    return " ".join([what.removeprefix("configs/").replace(".py", ""), *changes])
