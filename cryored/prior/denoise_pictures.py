"""A look at what a denoiser did: slices, correlation and power."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cryored.files.plots import new_figure, save_figure
from cryored.maps.fourier import forward, shell_power
from cryored.maps.fsc import shell_correlation
from cryored.maps.volume import Volume
from cryored.prior.kept_signal import LEAST_KEPT


def draw_denoised(path: str, given: Volume, result: Volume, kept: npt.NDArray[np.floating] | None = None) -> None:
    """Draw input, result and their difference on one grey scale, the FSC of the two, and the power of each.

    Parameters
    ----------
    path : str
        PNG to write.
    given, result : Volume
        On one grid.
    kept : (max(shape) // 2 + 1,) float, optional
        Share of the signal told that the result keeps (`cryored.prior.kept_signal`), NaN where that is not known.
    """
    figure = new_figure(11, 6.2)
    rows = figure.subplots(2, 6)
    for axis in rows.ravel():
        axis.remove()
    grid = rows[0, 0].get_gridspec()
    difference = result.data - given.data
    middle = given.shape[0] // 2
    white = float(np.percentile(result.data, 99.9))
    shown = {"input": given.data, "denoised": result.data, "denoised - input": difference}
    for place, (title, data) in enumerate(shown.items()):
        axis = figure.add_subplot(grid[0, 2 * place : 2 * place + 2])
        axis.imshow(data[middle], cmap="gray", vmin=-0.35 * white, vmax=white)
        axis.set(title=title, xticks=[], yticks=[])
    box = max(given.shape)
    frequency = np.arange(box // 2 + 1) / (box * given.voxel_size)
    left, right = figure.add_subplot(grid[1, :3]), figure.add_subplot(grid[1, 3:])
    left.plot(frequency[1:], shell_correlation(given.data, result.data)[1:], color="black", label="FSC of the two")
    left.set(ylabel="input and denoised", ylim=(-0.05, 1.03))
    if kept is not None and np.isfinite(kept).any():
        left.plot(frequency, kept, color="tab:red", label="signal kept, of what the FSC tells")
        left.axhline(LEAST_KEPT, color="tab:red", linewidth=0.8, linestyle=":")
        left.set(ylim=(-0.05, max(1.03, 1.1 * float(np.nanmax(kept)))))
        left.legend(frameon=False)
    for data, label in ((given.data, "input"), (result.data, "denoised"), (difference, "difference")):
        power = shell_power(forward(data), given.shape)
        right.semilogy(frequency[1:], np.maximum(power[1:], power.max() * 1e-12), label=label)
    right.set(ylabel="power of the shell")
    right.legend(frameon=False)
    for axis in (left, right):
        axis.set(xlabel="Spatial frequency (1/Å) and resolution (Å)", xlim=(0, frequency[-1]))
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:.3g}\n{1 / x:.1f} Å" if x > 0 else "0")
    save_figure(figure, path)
