"""What is run: scales, cells (a structure at a signal-to-noise ratio), and the runs of each."""

from __future__ import annotations

from dataclasses import dataclass

from cryored.errors import InputError
from cryored.simulate.refinement import GLOBAL_SEARCH, LOCAL_SEARCH

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
        Without one RELION's own program reconstructs.
    options : tuple of str
        Of ``cryored red-update``, besides the model.
    cells : tuple of Cell, optional
        Where it is done; by default in all cells with signal.
    """

    kind: str = "refine"
    model: str | None = None
    options: tuple[str, ...] = ()
    cells: tuple[Cell, ...] | None = None

    def belongs_to(self, cell: Cell) -> bool:
        """Tell whether the run is one of a cell's."""
        return not cell.is_noise if self.cells is None else cell in self.cells


SIGNAL = tuple(Cell(structure, level) for structure in STRUCTURES for level in LEVELS)
NOISES = (Cell("4ail", NOISE),)
INFLATED = (Cell("4btf", "ii"), Cell("4bb9", "iii"))  # where cwred's inflation is above what is allowed
SWAPPED = (Cell("4btf", "i"), Cell("4m82", "i"))  # proteins of about one size, for what the network leaves on every map
SUBSTITUTED = Cell("4m82", "ii")
CELLS = SIGNAL + NOISES

# In the order in which a cell's are done: `map` comes first, as single passes need its intermediates.
RUNS = {
    "map": Run(cells=CELLS),
    "true-angles": Run("true-angles"),
    "pass-cwred": Run("single-pass", "cwred"),
    "pass-cwred-paper": Run("single-pass", "cwred-paper"),
    "pass-cwred-gaussian": Run("single-pass", "cwred-gaussian"),
    "cwred": Run(model="cwred", options=("--lambda", "auto"), cells=CELLS),
    "cwred-paper": Run(model="cwred-paper", options=("--lambda", "paper")),
    "red": Run(model="cwred-paper", options=("--lambda", "1")),
    "cwred-gaussian": Run(
        model="cwred-gaussian",
        options=("--lambda", "paper"),
        cells=tuple(cell for cell in SIGNAL if cell.level == "ii"),
    ),
    "cwred-limit": Run(
        model="cwred",
        options=("--lambda", "auto", "--prior-limit", "6"),
        cells=(Cell("4ail", "i"), Cell("4m82", "i")),
    ),
    # The schedule gives noise no prior at all: what would it make of it?
    "cwred-forced": Run(model="cwred", options=("--lambda", "1"), cells=NOISES),
    # What might mend inflation: less prior at low resolution, or the prior in shells without data too.
    "cwred-line": Run(model="cwred", options=("--lambda", "paper"), cells=INFLATED),
    "cwred-extrapolate": Run(model="cwred", options=("--lambda", "auto", "--extrapolate"), cells=INFLATED),
    "swapped": Run("swapped", model="cwred", options=("--lambda", "auto"), cells=SWAPPED[1:]),
    "substituted": Run("substituted", model="cwred", cells=(SUBSTITUTED,)),
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
