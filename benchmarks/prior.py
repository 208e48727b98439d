"""What must hold for any prior: rotations and shifts commute with it, noise stays noise, and it is fast.

    python benchmarks/prior.py PAIRS.star [--model NAME]

PAIRS.star lists pairs that the model was not trained on; a few of them, spread over resolution, are used.

- rotation: relative L2 of the outputs for the 24 rotations of a map, turned back, to their mean;
- shift: relative L2 of the output for a map rolled by one voxel along each axis, rolled back, to the output itself;
- noise: two independent pure-noise half-maps, weighted as if their FSC were that of a map at 6 A: mean |FSC| of the
  two outputs in the shells above the tenth, over ten draws, and the largest of these means;
- seconds: loading the model and a first map of 96 voxels in a new process; the same map warm.
"""

from __future__ import annotations

import subprocess
import sys
import time

import click
import numpy as np

from cryored.prior.models import DEFAULT_MODEL

BOX, ANGPIX, DRAWS = 96, 1.5, 10
COLD = (
    "import time; begin = time.monotonic()\n"
    "import numpy as np\n"
    "from cryored.prior.denoiser import Denoiser\n"
    "from cryored.prior.models import find_model\n"
    "from cryored.maps.volume import Volume\n"
    "rng = np.random.default_rng(0)\n"
    "Denoiser(find_model({model!r}))(Volume(rng.standard_normal((96, 96, 96), dtype=np.float32), 1.5))\n"
    "print(time.monotonic() - begin)\n"
)


@click.command()
@click.argument("table", type=click.Path(exists=True))
@click.option("--model", default=DEFAULT_MODEL, show_default=True)
@click.option("--maps", default=5, show_default=True, help="Pairs used for rotation and shift.")
def main(table: str, model: str, maps: int) -> None:
    """Print the figures as a table."""
    from cryored.files.mrc import read_volume
    from cryored.maps.fourier import apply_shells
    from cryored.maps.fsc import shell_correlation
    from cryored.maps.volume import Volume
    from cryored.prior.denoiser import Denoiser, cube_rotations, rotate, rotate_back
    from cryored.prior.models import find_model
    from cryored.simulation.pair_pictures import spread
    from cryored.simulation.pair_table import read_pairs

    denoiser = Denoiser(find_model(model))

    def change(data: np.ndarray) -> np.ndarray:
        return denoiser(Volume(np.ascontiguousarray(data), ANGPIX)).data

    def relative(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.linalg.norm(a - b) / np.linalg.norm(b))

    turned, shifted = [], []
    for row in spread(read_pairs(table), maps):
        volume = read_volume(row.noisy)
        data = volume.data
        if denoiser.model.card.input == "regularised":
            data = apply_shells(data, np.clip(row.fsc, 0.0, 1.0))
        outputs = [rotate_back(change(rotate(data, rotation)), rotation) for rotation in cube_rotations()]
        mean = np.mean(outputs, axis=0)
        turned += [relative(output, mean) for output in outputs]
        shifted += [
            relative(np.roll(change(np.roll(data, 1, axis)), -1, axis), outputs[0]) for axis in range(data.ndim)
        ]
    click.echo(f"rotation\tmedian {np.median(turned):.3f}\tworst {max(turned):.3f}")
    click.echo(f"shift\tmedian {np.median(shifted):.3f}\tworst {max(shifted):.3f}")

    shell = BOX * ANGPIX / 6.0
    fsc = 1 / (1 + np.exp((np.arange(BOX // 2 + 1) - shell + 4) / 2))  # 0.5 four shells before 6 A, 0.12 there
    curves = []
    for draw in range(DRAWS):
        rng = np.random.default_rng(draw)
        halves = [change(apply_shells(rng.standard_normal((BOX,) * 3, dtype=np.float32), fsc)) for _ in range(2)]
        curves.append(np.abs(shell_correlation(*halves))[11 : int(shell) + 1])
    noise = np.mean(curves, axis=0)
    click.echo(f"noise\tmean |FSC| {noise.mean():.3f}\tlargest {noise.max():.3f}")

    begin = time.monotonic()
    change(data)
    warm = time.monotonic() - begin
    cold = subprocess.run([sys.executable, "-c", COLD.format(model=model)], capture_output=True, text=True, check=True)
    click.echo(f"seconds\tcold {float(cold.stdout):.1f}\twarm {warm:.2f}")


if __name__ == "__main__":
    main()
