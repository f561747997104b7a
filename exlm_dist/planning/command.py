"""`exlm plan`: its options and what it runs. Imported to read the command line, so what is heavy comes later."""

from __future__ import annotations

import argparse


def add_options(plan: argparse.ArgumentParser) -> None:
    """Options of `exlm plan`; the hardware is an H100 SXM unless they say otherwise."""
    plan.add_argument("config", help="YAML file")
    plan.add_argument("--gpus", type=_positive, required=True, help="number of GPUs")
    plan.add_argument("--gpu-memory", type=float, default=80, help="memory of a GPU in GiB")
    plan.add_argument(
        "--margin", type=float, default=0.1, help="share of it left to CUDA, NCCL and the gaps of the allocator"
    )
    plan.add_argument("--node-size", type=_positive, default=8, help="GPUs of a node")
    plan.add_argument("--flops", type=float, default=989, help="TFLOP/s of a GPU, bf16 dense (H100 SXM datasheet)")
    plan.add_argument("--memory-bandwidth", type=float, default=3350, help="GB/s of its memory (H100 SXM datasheet)")
    plan.add_argument("--link-bandwidth", type=float, default=450, help="GB/s in a node, one direction (NVLink 4)")
    plan.add_argument(
        "--network-bandwidth", type=float, default=50, help="GB/s between nodes, per GPU (one 400 Gbit/s port)"
    )
    plan.add_argument("--length", type=int, help="sequence length; default: that of the prepared data, else 128")
    plan.add_argument("--vocab-size", type=int, help="vocabulary; default: that of the prepared data, else 32000")
    plan.add_argument("--top", type=int, default=8, help="grids shown")


def run(options: argparse.Namespace, overrides: list[str]) -> int:
    """Print the answer."""
    from exlm_dist.config import load_config
    from exlm_dist.planning.hardware import Hardware
    from exlm_dist.planning.report import plan_text

    hardware = Hardware(
        flops=options.flops * 1e12,
        memory_bandwidth=options.memory_bandwidth * 1e9,
        link_bandwidth=options.link_bandwidth * 1e9,
        network_bandwidth=options.network_bandwidth * 1e9,
        node_size=options.node_size,
    )
    text = plan_text(
        load_config(options.config, overrides),
        gpus=options.gpus,
        memory=options.gpu_memory * 2**30,
        margin=options.margin,
        hardware=hardware,
        length=options.length,
        vocab_size=options.vocab_size,
        top=options.top,
    )
    print(text)
    return 0


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)
