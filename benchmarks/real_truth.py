"""A real map as the truth of a simulated experiment: what benchmarks/refine.py takes in place of an atomic model.

    python benchmarks/real_truth.py MAP.mrc -o truth.mrc [--resolution 3.2] [--box 96] [--angpix 1.5]

The sharpening is undone (`cryored.prior.falloff`), noise beyond the resolution and around the molecule is taken
away (a low-pass filter with a soft edge, an automatic mask), and it is resampled. What is left has what density made of
atoms has not: flexible parts that fade, ligands, waters, what the microscope and the processing did to amplitudes.
"""

from __future__ import annotations

import click
import numpy as np


@click.command()
@click.argument("map_path", type=click.Path(exists=True))
@click.option("-o", "--output", required=True)
@click.option("--resolution", default=3.2, show_default=True, help="Of the map, in angstrom.")
@click.option("--box", default=96, show_default=True)
@click.option("--angpix", default=1.5, show_default=True)
def main(map_path: str, output: str, resolution: float, box: int, angpix: float) -> None:
    """Write the truth."""
    from cryored.files.mrc import read_volume, write_volume
    from cryored.maps.fourier import forward, inverse, spatial_frequency
    from cryored.maps.mask import soft_mask
    from cryored.maps.resample import plan_axis, to_grid
    from cryored.maps.volume import Volume, raised_cosine, window
    from cryored.prior.falloff import sharpened, sharpening

    given = read_volume(map_path)
    bfactor = max(sharpening(given), 0.0)
    blurred = sharpened(given.data, given.voxel_size, -bfactor)
    frequency = spatial_frequency(blurred.shape, given.voxel_size) * resolution
    filtered = inverse(forward(blurred) * raised_cosine((frequency - 0.95) / 0.1), blurred.shape)
    masked = filtered * soft_mask(Volume(filtered.astype(np.float32), given.voxel_size)).data
    z, y, x = (plan_axis(n, given.voxel_size, angpix) for n in given.shape)
    sampled = to_grid(masked.astype(np.float32), (z, y, x), 0.0)
    truth = Volume(window(sampled, (box,) * 3).astype(np.float32), angpix)
    write_volume(output, truth, label=f"real truth {resolution:g} A, B {bfactor:.0f} A2")
    click.echo(f"{output}: a B factor of {bfactor:.0f} A^2 undone, {resolution:g} A, {box} voxels of {angpix:g} A")


if __name__ == "__main__":
    main()
