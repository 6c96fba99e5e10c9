"""What computing costs, for scripts/benchmark: the machine's matrix products, and our step over length and rank."""

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# Each product is repeated for this long, and the fastest counts: a ceiling is what nothing else slows down.
PRODUCT_SECONDS = 1.0
# A point of the sweep takes at least so many tokens a measurement.
POINT_TOKENS = 2048
# Ranks over which a token should cost the same.
FLAT_RANKS = (4, 64)
INK, BLUE, ORANGE = "#222222", "#0072B2", "#D55E00"


def products(args: argparse.Namespace) -> dict[str, tuple[int, int, int, int]]:
    """The base's products of a step's forward and backward pass: rows, inner dim, columns, how often.

    No product for the gradient of a base weight: those do not exist. The head's logits stand once in each pass.
    """
    tokens, d, f = args.batch * args.length, args.dim, args.ffn
    return {
        "embed -> embed": (tokens, d, d, 8 * args.layers),  # q, k, v, o and their transposes
        "embed -> mlp": (tokens, d, f, 3 * args.layers),  # gate, up, and the transpose of down
        "mlp -> embed": (tokens, f, d, 3 * args.layers),
        "embed -> vocab": (tokens, d, args.vocab, 1),
        "vocab -> embed": (tokens, args.vocab, d, 1),
    }


def open_products(args: argparse.Namespace, folder: Path) -> Callable[[Any], dict[str, Any]]:
    """Answers with FLOP/s by product, of XLA or of torch; XLA's process also with the FLOPs of our step."""

    def measure(_: Any) -> dict[str, Any]:
        multiply = _torch_product if args.worker == "torch" else _xla_product
        rates = {}
        for name, (rows, inner, columns, _) in products(args).items():
            rates[name] = 2.0 * rows * inner * columns / _fastest(multiply(args, rows, inner, columns))
        return {"rates": rates} | ({"flops": _dense_flops(args, folder)} if args.worker == "xla" else {})

    return measure


def _fastest(run: Callable[[], None]) -> float:
    run()
    best, end = math.inf, time.perf_counter() + PRODUCT_SECONDS
    while time.perf_counter() < end:
        began = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - began)
    return best


def _xla_product(args: argparse.Namespace, rows: int, inner: int, columns: int) -> Callable[[], None]:
    import jax
    import jax.numpy as jnp

    a, b, out = jnp.ones((rows, inner)), jnp.ones((inner, columns)), [jnp.ones((rows, columns))]
    # Into the same memory each time, as a compiled step reuses its own.
    product = jax.jit(lambda a, b, out: a @ b, donate_argnums=2, keep_unused=True)

    def run() -> None:
        out[0] = jax.block_until_ready(product(a, b, out[0]))

    return run


def _torch_product(args: argparse.Namespace, rows: int, inner: int, columns: int) -> Callable[[], None]:
    import torch

    torch.set_num_threads(args.threads)
    a, b, out = torch.ones(rows, inner), torch.ones(inner, columns), torch.ones(rows, columns)
    return lambda: torch.mm(a, b, out=out)


def _dense_flops(args: argparse.Namespace, folder: Path) -> float:
    import jax

    from jlora.config import load_config
    from jlora.model.sharding import make_mesh

    cfg = load_config(folder / "ours.yaml", args.overrides)
    mesh = make_mesh(cfg.mesh, jax.devices())
    with jax.set_mesh(mesh):
        return needed_flops(cfg, mesh)


def needed_flops(cfg: Any, mesh: Any) -> float:
    """FLOPs of our step by its jaxpr, with what it recomputes, and of attention's square the half that is seen.

    The jaxpr is that over the reference attention, which computes the whole square: 4 products forward and
    backward, each twice, of [T H] x [H T] for every head.
    """
    from jlora.hf.planned import model_shape
    from jlora.planning.compiled import step_flops
    from jlora.training.step import make_forward

    model = model_shape(cfg.model.path)
    square = cfg.training.batch_size * cfg.data.max_length**2 * model.num_attention_heads * model.head_dim
    passes = 3 if cfg.model.remat == "none" else 4
    unseen = passes * 4.0 * square * model.num_hidden_layers / 2
    return step_flops(cfg, model, mesh, make_forward(cfg, model, mesh)[1]) - unseen


def points(args: argparse.Namespace) -> list[dict[str, int]]:
    """The steps of the sweep: one row of each length, then a dense batch for each rank."""
    lengths = [{"length": length, "batch": 1, "rank": args.rank} for length in args.lengths]
    return lengths + [{"length": args.length, "batch": args.batch, "rank": rank} for rank in args.ranks]


def open_sweep(args: argparse.Namespace, folder: Path) -> Callable[[Any], dict[str, Any]]:
    """Answers a point's number with a step's seconds, tokens and FLOPs; compiles it when first asked."""
    import jax
    from benchmark_sides import Ours, open_ours

    cfg, base, base_hash, mesh = open_ours(folder, args.overrides)
    jax.set_mesh(mesh)
    steps: dict[int, tuple[Ours, float]] = {}
    draw = np.random.default_rng(args.seed)

    def measure(number: int) -> dict[str, Any]:
        point = points(args)[number]

        def random_rows(batches: int) -> list[tuple[np.ndarray, np.ndarray]]:
            shape = batches * point["batch"], point["length"]
            ids = draw.integers(0, args.vocab, shape, dtype=np.int32)
            return [(row, np.arange(len(row)) > 0) for row in ids]

        if number not in steps:
            changed = cfg.model_copy(
                update={
                    "lora": cfg.lora.model_copy(
                        update={"rank": point["rank"], "alpha": 2.0 * point["rank"], "init_from": None}
                    ),
                    "data": cfg.data.model_copy(update={"max_length": point["length"]}),
                    "training": cfg.training.model_copy(update={"batch_size": point["batch"]}),
                }
            )
            steps[number] = Ours(changed, base, base_hash, mesh), needed_flops(changed, mesh)
            steps[number][0].train(random_rows(1))
        side, flops = steps[number]
        tokens = point["batch"] * point["length"]
        repeats = max(1, POINT_TOKENS // tokens)
        return {"tokens": tokens, "flops": flops, "seconds": side.train(random_rows(repeats))["seconds"] / repeats}

    return measure


def conclude(lengths: list[dict[str, Any]], ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """The points with what they say: the spread of a token's cost over ranks, and the fit over lengths."""
    from scipy.optimize import nnls

    tokens, seconds = (np.array([point[name] for point in lengths], float) for name in ("tokens", "seconds"))
    # Relative errors are made small, since the longest step takes many times as long as the shortest.
    terms = np.stack([np.ones_like(tokens), tokens, tokens**2], 1) / seconds[:, None]
    (fixed, per_token, square), _ = nnls(terms, np.ones_like(tokens))
    deviation = float(np.abs(terms @ (fixed, per_token, square) - 1).max())
    cost = {point["rank"]: point["seconds"] / point["tokens"] for point in ranks}
    compared = [cost[rank] for rank in cost if FLAT_RANKS[0] <= rank <= FLAT_RANKS[1]] or [math.nan]
    spread = max(compared) / min(compared) - 1
    speed = [point["flops"] / point["seconds"] for point in lengths + ranks]
    words = (
        f"cost of a token over ranks {FLAT_RANKS[0]} to {FLAT_RANKS[1]}: within {spread:.1%}; seconds of a step of T "
        f"tokens: {fixed:.3f} + {per_token:.3g} T + {square:.3g} T^2, within {deviation:.1%} of every length"
    )
    return {
        "lengths": lengths,
        "ranks": ranks,
        "rank_spread": spread,
        "fit": {"seconds": fixed, "per_token": per_token, "per_token_squared": square, "deviation": deviation},
        "flops_per_second": [min(speed), max(speed)],
        "words": words,
    }


def draw(result: dict[str, Any], path: Path) -> None:
    """A token's cost over length and over rank, and all steps against their work."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (by_length, by_rank, by_work) = pyplot.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    fit = result["fit"]
    tokens, seconds = (np.array([point[name] for point in result["lengths"]]) for name in ("tokens", "seconds"))
    by_length.plot(tokens, seconds / tokens * 1e6, "o", color=INK, label="measured")
    line = np.geomspace(tokens.min(), tokens.max())
    straight = fit["seconds"] / line + fit["per_token"]
    by_length.plot(line, (straight + fit["per_token_squared"] * line) * 1e6, color=BLUE, label="a + b T + c T²")
    by_length.plot(line, straight * 1e6, "--", color=ORANGE, label="without attention's square")
    by_length.set(title="over length", xlabel="tokens in a row, T", xscale="log")
    ranks = [point["rank"] for point in result["ranks"]]
    cost = [point["seconds"] / point["tokens"] * 1e6 for point in result["ranks"]]
    work = [point["flops"] / point["tokens"] for point in result["ranks"]]
    by_rank.plot(ranks, cost, "o-", color=INK, label="measured")
    by_rank.plot(ranks, [cost[0] * flops / work[0] for flops in work], "--", color=ORANGE, label="as its FLOPs")
    by_rank.set(title="over rank", xlabel="rank", xscale="log")
    for points, name, colour in (("lengths", "lengths", BLUE), ("ranks", "ranks", ORANGE)):
        x, y = ([point[key] for point in result[points]] for key in ("flops", "seconds"))
        by_work.plot(np.array(x) / 1e9, y, "o", color=colour, label=name)
    by_work.set(
        title="all steps against work", xlabel="GFLOP a step", xscale="log", yscale="log", ylabel="seconds a step"
    )
    for axes, values in ((by_length, tokens), (by_rank, ranks)):
        axes.set(ylabel="us a token")
        axes.set_ylim(bottom=0)
        axes.set_xticks(values, [str(value) for value in values])
        axes.minorticks_off()
    for axes in (by_length, by_rank, by_work):
        axes.legend(frameon=False, fontsize=8)
        axes.grid(color="#dddddd", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110, facecolor="white")
    pyplot.close(figure)
