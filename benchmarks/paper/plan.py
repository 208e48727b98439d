"""What is run: scales, cells (a structure at a signal-to-noise ratio), and the runs of each."""

from __future__ import annotations

from dataclasses import dataclass

from cryored.errors import InputError
from cryored.refinement.relion_runs import GLOBAL_SEARCH, LOCAL_SEARCH

# The paper's structures, and what stands for each where its own file is not there.
STRUCTURES = {"4ail": "4F3T", "4bb9": "2XZP", "4btf": "7NF3", "4m82": "7MJZ"}
LEVELS = ("i", "ii", "iii", "iv")  # signal-to-noise ratios, from best to worst
NOISE = "noise"  # particles without signal


@dataclass(frozen=True)
class Scale:
    """A size of the experiment.

    Parameters
    ----------
    name : str
    box, number : int
        Edge of the images in pixels; particles of a cell.
    angpix : float
        Pixel size in angstrom.
    snr : tuple of float
        One for each of `LEVELS`.
    perturb : float
        Root mean square error of the start angles in degrees.
    search : tuple of str
        RELION's options of the search.
    timeout : float
        Seconds that a refinement may take.
    """

    name: str
    box: int
    number: int
    angpix: float
    snr: tuple[float, ...]
    perturb: float
    search: tuple[str, ...]
    timeout: float


# Number times SNR decides the resolution; it is the same at both scales: 25 (about 4.5 A) to 3 (hopeless).
SCALES = {
    "small": Scale("small", 96, 1000, 1.5, (0.025, 0.012, 0.006, 0.003), 5.0, LOCAL_SEARCH, 3600.0),
    "paper": Scale("paper", 96, 10000, 1.5, (0.0025, 0.0012, 0.0006, 0.0003), 180.0, GLOBAL_SEARCH, 86400.0),
}


@dataclass(frozen=True)
class Cell:
    """A structure at one of `LEVELS`, or `NOISE` in its place."""

    structure: str
    level: str

    def __str__(self) -> str:
        """Return the name on the command line and in tables."""
        return f"{self.structure}:{self.level}"

    @property
    def is_noise(self) -> bool:
        """Whether the particles have no signal."""
        return self.level == NOISE


@dataclass(frozen=True)
class Run:
    """One thing that is done with a cell's particles.

    Parameters
    ----------
    kind : {"refine", "true-angles", "single-pass", "swapped", "substituted"}
        A refinement; a reconstruction with the true angles; a model on the intermediates of the run ``map``; maps of
        the two proteins of `SWAPPED`; a model on the half-maps of ``map`` with noise in place of the signal.
    model : str, optional
        Without one RELION's own program reconstructs, or the oracle.
    options : tuple of str
        Of ``cryored red-update``, besides the model.
    masked : bool
        With a solvent mask that is made from the final map of ``map``, and the FSC corrected for it.
    oracle : bool
        The truth stands in for the denoised map (benchmarks/oracle.py).
    limit : float, optional
        Noise stands for the signal beyond the resolution at which the masked half-map FSC falls below this, not from
        8 A on.
    cells : tuple of Cell, optional
        Where it is done; by default in all cells with signal.
    """

    kind: str = "refine"
    model: str | None = None
    options: tuple[str, ...] = ()
    masked: bool = False
    oracle: bool = False
    limit: float | None = None
    cells: tuple[Cell, ...] | None = None

    @property
    def calibrated(self) -> bool:
        """Whether the weights in the model's card decide: eq. 17 with a lambda has none, nor has a single pass."""
        return self.options[:2] == ("--lambda", "auto")

    def belongs_to(self, cell: Cell) -> bool:
        """Tell whether the run is one of a cell's."""
        return not cell.is_noise if self.cells is None else cell in self.cells


SIGNAL = tuple(Cell(structure, level) for structure in STRUCTURES for level in LEVELS)
NOISES = (Cell("4ail", NOISE),)
LEVEL_II = tuple(cell for cell in SIGNAL if cell.level == "ii")
BETTER = tuple(cell for cell in SIGNAL if cell.level in ("i", "ii"))
SWAPPED = (Cell("4btf", "i"), Cell("4m82", "i"))  # proteins of about one size, for what the network leaves on every map
CELLS = SIGNAL + NOISES

# In the order in which a cell's are done: `map` comes first, as masks and single passes are made from it.
RUNS = {
    "map": Run(cells=CELLS),
    "true-angles": Run("true-angles"),
    "pass-cwred": Run("single-pass", "cwred"),
    "pass-cwred-paper": Run("single-pass", "cwred-paper"),
    "pass-cwred-gaussian": Run("single-pass", "cwred-gaussian"),
    "map-mask": Run(masked=True),
    "cwred": Run(model="cwred", options=("--lambda", "auto"), cells=CELLS),
    "cwred-mask": Run(model="cwred", options=("--lambda", "auto"), masked=True),
    # The same network by the equation as published.
    "cwred-eq17": Run(model="cwred", options=("--lambda", "1")),
    "cwred-paper": Run(model="cwred-paper", options=("--lambda", "paper")),
    "red": Run(model="cwred-paper", options=("--lambda", "1")),
    "red-mask": Run(model="cwred-paper", options=("--lambda", "1"), masked=True, cells=LEVEL_II),
    "oracle": Run(oracle=True, cells=LEVEL_II),
    "oracle-mask": Run(oracle=True, masked=True, cells=BETTER),
    "cwred-gaussian": Run(model="cwred-gaussian", options=("--lambda", "paper"), cells=LEVEL_II),
    "cwred-limit": Run(
        model="cwred",
        options=("--lambda", "auto", "--prior-limit", "6"),
        cells=(Cell("4ail", "i"), Cell("4m82", "i")),
    ),
    # More and less belief in the denoised map than was measured.
    "cwred-strong": Run(model="cwred", options=("--lambda", "auto", "--trust", "4"), cells=LEVEL_II),
    "cwred-weak": Run(model="cwred", options=("--lambda", "auto", "--trust", "0.25"), cells=LEVEL_II),
    # The schedule gives noise no prior at all: what would it make of it?
    "cwred-forced": Run(model="cwred", options=("--lambda", "1"), cells=NOISES),
    "swapped": Run("swapped", model="cwred", options=("--lambda", "auto"), cells=SWAPPED[1:]),
    "substituted": Run("substituted", model="cwred"),
    "substituted-143": Run("substituted", model="cwred", limit=0.143),
}

NOISE_RUNS = tuple(name for name, run in RUNS.items() if run.model and run.belongs_to(NOISES[0]))


def parse_cells(text: str) -> list[Cell]:
    """Return the cells of a list such as ``4ail:i,4m82``; a structure alone stands for all its cells.

    Raises
    ------
    InputError
        A cell that there is not.
    """
    found: list[Cell] = []
    for word in text.split(","):
        matching = [cell for cell in CELLS if word in (str(cell), cell.structure)]
        if not matching:
            raise InputError(
                f"'{word}' is no cell, expected one as 4ail:i, of {', '.join(STRUCTURES)} and {', '.join(LEVELS)}, "
                f"or {' or '.join(map(str, NOISES))}"
            )
        found += [cell for cell in matching if cell not in found]
    return found


def parse_runs(text: str) -> list[str]:
    """Return the runs of a list such as ``map,cwred``, in the order in which they are done.

    Raises
    ------
    InputError
        A run that there is not.
    """
    words = text.split(",")
    for word in words:
        if word not in RUNS:
            raise InputError(f"'{word}' is no run, expected some of {', '.join(RUNS)}")
    return [name for name in RUNS if name in words]
