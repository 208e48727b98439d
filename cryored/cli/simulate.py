"""``cryored simulate``: maps, particles and training pairs."""

from __future__ import annotations

import click

from cryored.cli.simulate_map import simulate_map
from cryored.cli.simulate_pairs import simulate_pairs
from cryored.cli.simulate_particles import particles


@click.group()
def simulate() -> None:
    """Make maps, particles and training pairs from atomic models."""


simulate.add_command(simulate_map)
simulate.add_command(particles)
simulate.add_command(simulate_pairs)
