"""Errors of refined orientations against the true ones, as axis-angle."""

from __future__ import annotations

import os
from collections import Counter

import numpy as np

from cryored.errors import InputError
from cryored.files.star import Star, read_star
from cryored.reconstruction.projection import Doubles, angular_distance, rotation_matrices

AnyPath = str | os.PathLike[str]

_BLOCK = "particles"
_NAME = "rlnImageName"


def angular_error(rotations: Doubles, truth: Doubles, *, align: bool = False) -> Doubles:
    """Return the angle in degrees, (n,), by which each orientation is off.

    It is the angle of the one turn about one axis that takes the true orientation to the refined one, so that,
    unlike differences of Euler angles, it does not depend on where the particle points.

    Parameters
    ----------
    rotations, truth : (n, 3, 3) float64
        RELION's matrices (see `cryored.reconstruction.projection`), particle by particle.
    align : bool
        Take off the turn that all particles share (see `common_rotation`). Right where the map had no reason to
        lie as the truth does: from an initial model of its own, or aligned to another map. Not where the
        reference was made from the truth: a map that turned as a whole is then an error too, and taking off the
        mean flatters a refinement of few particles.
    """
    return angular_distance(rotations, truth @ common_rotation(rotations, truth) if align else truth)


def common_rotation(rotations: Doubles, truth: Doubles) -> Doubles:
    """Return the rotation G (3, 3) that brings ``truth @ G`` nearest to `rotations`, both (n, 3, 3).

    The matrices act on coordinates of the map, so one that is turned as a whole by G' has all its particles at
    ``truth @ G``. Nearest is least squares over the matrices' elements (the chordal mean), in which orientations
    that are wrong at random cancel.
    """
    left, _, right = np.linalg.svd(np.einsum("nji,njk->ik", truth, rotations))
    left[:, -1] *= np.linalg.det(left @ right)  # a rotation, never a reflection
    return left @ right


def angular_error_file(star: AnyPath, truth_star: AnyPath, *, align: bool = False) -> Doubles:
    """Return the errors in degrees, (n,), of the particles of a STAR file, in its order (see `angular_error`).

    Parameters
    ----------
    star, truth_star : path
        RELION 3.1 or later: ``run_data.star`` of a refinement, and the angles that the images were made with.
        Particles are matched by rlnImageName; the truth may list them in another order, and more of them.
    align : bool
        See `angular_error`.

    Raises
    ------
    InputError
        A file has no such table, names an image twice, or a particle is not in the truth.
    """
    found, true = read_star(star), read_star(truth_star)
    names, rows = _image_names(found), {name: row for row, name in enumerate(_image_names(true))}
    missing = [name for name in names if name not in rows]
    if missing:
        raise InputError(
            f"{found.name}: {len(missing)} of {len(names)} particles are not in {true.name}, the first "
            f"'{missing[0]}', expected each _{_NAME} there; give the truth of the same images under the same names"
        )
    return angular_error(_rotations(found), _rotations(true)[[rows[name] for name in names]], align=align)


def _image_names(star: Star) -> list[str]:
    names = star.texts(_BLOCK, _NAME)
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise InputError(
            f"{star.name}: '{name}' {times} times in _{_NAME}, expected each image once; remove the others"
        )
    return names


def _rotations(star: Star) -> Doubles:
    return rotation_matrices(*(star.numbers(_BLOCK, f"rlnAngle{angle}") for angle in ("Rot", "Tilt", "Psi")))
