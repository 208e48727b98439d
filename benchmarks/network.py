"""How near the network comes to what this machine's CPU can do: ``python benchmarks/network.py [--edge 96]``.

Beside the network's warm time, of one map: all of its convolutions one by one, bare, by the same library, with
nothing between them; and the rate of a large matrix product in float32, which no convolution exceeds. The ways take
turns; seconds are medians. The rest of the network is what is done between the convolutions: normalising, pooling.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import click
import numpy as np

from cryored.prior import device
from cryored.prior.models import find_model, load_network

_PRODUCT = 2048


def timed(call: Callable[[], Any]) -> float:
    """Return seconds."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def convolutions(network: Any, inputs: list[Any]) -> Counter[tuple[tuple[int, ...], tuple[int, ...], bool]]:
    """Return how many convolutions of each shape of input and kernel there are, and whether it is transposed."""
    import keras

    layers = [
        layer for layer in network.layers if isinstance(layer, (keras.layers.Conv3D, keras.layers.Conv3DTranspose))
    ]
    shapes = keras.Model(network.inputs, [layer.input for layer in layers])
    outputs = shapes.predict_on_batch(inputs)
    return Counter(
        (tuple(data.shape), tuple(layer.kernel.shape), isinstance(layer, keras.layers.Conv3DTranspose))
        for layer, data in zip(layers, outputs, strict=True)
    )


def bare(shape: tuple[int, ...], kernel: tuple[int, ...], transposed: bool) -> tuple[Callable[[], Any], float]:
    """Return a convolution of random numbers, and its floating-point operations."""
    import tensorflow as tf

    data, weights = tf.random.normal(shape), tf.random.normal(kernel)
    if transposed:
        larger = (shape[0], *(2 * n for n in shape[1:4]), kernel[3])
        run = tf.function(lambda: tf.nn.conv3d_transpose(data, weights, larger, 2))
    else:
        run = tf.function(lambda: tf.nn.conv3d(data, weights, [1] * 5, "SAME"))
    return run, 2.0 * float(np.prod(shape[:4])) * float(np.prod(kernel))


@click.command(help=__doc__)
@click.option("--edge", default=96, show_default=True, help="Of the map, in voxels; a multiple of 32.")
@click.option("--model", default="cwred", show_default=True)
@click.option("--repeats", default=7, show_default=True)
def main(edge: int, model: str, repeats: int) -> None:
    """Print a table."""
    device.set_up(gpu=False)
    import tensorflow as tf

    tf.get_logger().setLevel("ERROR")  # each convolution is traced, as it warns
    found = find_model(model)
    network = load_network(found)
    data = np.random.default_rng(0).standard_normal((1, edge, edge, edge, 1), dtype=np.float32)
    inputs = [data, np.ones((1, found.card.knots + 1), np.float32)] if found.card.knots else [data]
    kinds = convolutions(network, inputs)
    calls, operations = zip(*(bare(*kind) for kind in kinds), strict=True)
    matrix = tf.random.normal((_PRODUCT, _PRODUCT))
    product = tf.function(lambda: matrix @ matrix)
    ways = [lambda: network.predict_on_batch(inputs), product, *calls]
    for way in ways:
        way()
    turns = [[timed(way) for way in ways] for _ in range(repeats)]
    whole, multiplied, *each = (statistics.median(column) for column in zip(*turns, strict=True))
    peak = 2 * _PRODUCT**3 / multiplied
    click.echo("convolution\tnumber\ts_each\tGFLOP/s")
    for (shape, kernel, transposed), took, work in zip(kinds, each, operations, strict=True):
        name = f"{kernel[0]} voxels, {shape[4]} to {kernel[3 if transposed else 4]} channels, edge {shape[1]}"
        name += ", transposed" if transposed else ""
        click.echo(f"{name}\t{kinds[shape, kernel, transposed]}\t{took:.4f}\t{work / took / 1e9:.0f}")
    total = sum(number * took for number, took in zip(kinds.values(), each, strict=True))
    work = sum(number * one for number, one in zip(kinds.values(), operations, strict=True))
    click.echo(f"network {whole:.3f} s; its convolutions alone {total:.3f} s: {total / whole:.2f} of it")
    click.echo(f"{work / 1e9:.1f} GFLOP at {work / whole / 1e9:.0f} GFLOP/s")
    click.echo(f"at the {peak / 1e9:.0f} GFLOP/s of a matrix product: {work / peak:.3f} s")


if __name__ == "__main__":
    main()
