"""``cryored models``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from cryored.cli import options

if TYPE_CHECKING:
    from cryored.prior.models import Model


@click.command()
@click.argument("name", required=False, metavar="[NAME_OR_PATH]", shell_complete=options.complete_model)
@click.option("--json", "as_json", envvar="CRYORED_MODELS_JSON", is_flag=True, help="Print the card as it is.")
@options.common
def models(name: str | None, as_json: bool) -> None:
    """List the models that --model finds by name; or tell of one what its card knows.

    The card says what the model was trained on, for which pixel size and resolutions, how good it was on structures
    that it had not seen, and by which weights the update believes it.

    \b
    Example:
      cryored models
      cryored models cwred
    """
    import json
    from dataclasses import asdict

    from cryored.errors import ModelError
    from cryored.prior.models import check_weights, find_model, list_models

    if name is None:
        for each, found in list_models():
            if isinstance(found, ModelError):
                click.echo(f"{each}\tcannot be used: {found}")
            elif as_json:
                click.echo(json.dumps(asdict(found.card)))
            else:
                click.echo(f"{each}\t{_in_a_line(found)}")
        return
    model = find_model(name)
    if as_json:
        click.echo(json.dumps(asdict(model.card), indent=2))
        return
    for label, text in _described(model):
        click.echo(f"{label + ':':<14}{text}")
    check_weights(model)


def _in_a_line(model: Model) -> str:
    card = model.card
    fine, coarse = card.resolution_range
    told = ", told the FSC" if card.knots else ""
    return f"{card.input} maps of {card.pixel_size:g} A/pixel, {fine:.3g} to {coarse:.3g} A{told}"


def _described(model: Model) -> list[tuple[str, str]]:
    card = model.card
    fine, coarse = card.resolution_range
    training = card.training
    facts = {key: training[key] for key in ("structures", "refinements", "pairs", "step", "steps") if key in training}
    rows = [
        ("name", card.name),
        ("folder", str(model.folder)),
        ("sees", f"{card.input} maps at {card.pixel_size:g} A/pixel" + (", and their FSC" if card.knots else "")),
        ("for", f"maps resolved to {fine:.3g} to {coarse:.3g} A"),
        ("tells", "the map, and how sure it is" if card.uncertainty else "the map"),
        ("trained on", "simulated maps: " + ", ".join(f"{key} {value}" for key, value in facts.items())),
    ]
    if training.get("command"):
        rows.append(("by", str(training["command"])))
    rows += [("measured", line) for line in _measured(card.evaluation)]
    rows.append(("weights", _weights(card.weights)))
    if card.weights_masked:
        rows.append(("in a mask", _weights(card.weights_masked)))
    rows.append(("sha256", card.sha256))
    return rows


def _measured(evaluation: dict[str, Any]) -> list[str]:
    """Return a line for each range of resolutions, of the last data set in the card."""
    lines = []
    for kind, rows in evaluation.items():
        if not isinstance(rows, list):
            continue
        for row in rows:
            if isinstance(row, dict) and "median_error_to_wiener" in row:
                lines.append(
                    f"{kind.replace('_', ' ')}, {row['resolution']}: error {row['median_error_to_wiener']:g} of the "
                    f"filtered map's, inside the molecule {row.get('median_inside_error_to_wiener', float('nan')):g}"
                )
    return lines


def _weights(weights: dict[str, Any]) -> str:
    if not weights:
        return "none: the update is eq. 17"
    structures = len(weights.get("structures", []))
    return (
        f"calibrated on {weights.get('maps', '?')} half-maps of {structures} structures: precision "
        f"{min(weights['precision']):g} to {max(weights['precision']):g}, trust {weights.get('trust', 1):g}"
    )
