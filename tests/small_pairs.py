"""Tables of pairs small enough to train on in a test."""

from __future__ import annotations

import numpy as np

from cryored.files.mrc import write_volume
from cryored.maps.resample import fourier_resize
from cryored.maps.volume import Volume, soft_sphere
from cryored.simulation.pair_table import PairRow, write_pairs
from cryored.training.loop import Recipe

BOX, ANGPIX = 16, 3.0
TINY = Recipe(
    width=2, depth=1, patch=8, batch_size=4, steps=24, learning_rate=1e-2, schedule="cosine", validate_every=8
)


def write_tables(folder, name, structures, *, box=BOX, angpix=ANGPIX, share=0.5):
    """Write pairs whose target is `share` of a smooth map, beside noise that a network can tell from it."""
    rows = []
    for number, structure in enumerate(structures):
        rng = np.random.default_rng([number, *structure.encode()])
        smooth = fourier_resize(rng.standard_normal((6, 6, 6)), (box,) * 3) * soft_sphere((box,) * 3, box / 3, 3)
        truth = str(folder / f"{structure}_{number}_truth.mrc")
        write_volume(truth, Volume(smooth.astype(np.float32), angpix), label="test")
        for half in (1, 2):
            noisy = (smooth + 0.3 * rng.standard_normal((box,) * 3)).astype(np.float32)
            paths = [str(folder / f"{structure}_{number}_half{half}_{kind}.mrc") for kind in ("noisy", "target")]
            for path, data in zip(paths, (noisy, share * smooth), strict=True):
                write_volume(path, Volume(data.astype(np.float32), angpix), label="test")
            fsc = np.linspace(1, -0.1, box // 2 + 1)
            rows.append(PairRow(*paths, structure, half, 5.0 + number, fsc, "gaussian", 0, truth))
    write_pairs(folder / name, rows, made_by="test")
    return str(folder / name)
