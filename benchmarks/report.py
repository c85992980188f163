"""Tables and figures of results, for evidence.py and curation.py."""

import numpy as np
from matplotlib.figure import Figure


def spread(values):
    """Mean (lowest-highest) of the values that are not None: without a success, entropy is None."""
    values = [value for value in values if value is not None]
    if not values:
        return "-"
    return f"{np.mean(values):.3f} ({min(values):.3f}-{max(values):.3f})"


def markdown(found, quantities, nfes):
    """{row: [{NFE: results} of each seed]} -> mean (lowest-highest) of both quantities, per NFE."""
    columns = " | ".join(f"NFE {nfe}" for nfe in nfes)
    lines = [f"| | seeds | parameters | training, CPU s | {columns} |"]
    lines.append("|---" * (4 + len(nfes)) + "|")
    for row, of_seeds in found.items():
        runs = [results[nfes[0]] for results in of_seeds]
        seconds = np.mean([run["seconds"] for run in runs])
        parameters = runs[0]["parameters"]
        cells = [row.label, str(len(runs)), f"{parameters:,}", f"{seconds:.0f}"]
        for nfe in nfes:
            both = [spread(results[nfe][name] for results in of_seeds) for name in quantities]
            cells.append(" / ".join(both))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(found, quantities, nfes, file):
    """Both quantities against NFE, a line per row, a band from lowest to highest seed."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    places = range(len(nfes))
    for axis, quantity in zip(axes, quantities, strict=True):
        for row, of_seeds in found.items():
            values = [[results[nfe][quantity] for nfe in nfes] for results in of_seeds]
            values = np.array(values, float)
            (line,) = axis.plot(places, values.mean(0), marker="o", ms=4, label=row.label)
            axis.fill_between(
                places,
                values.min(0),
                values.max(0),
                color=line.get_color(),
                alpha=0.2,
            )
        axis.set(
            xticks=places,
            xticklabels=nfes,
            ylim=(0, None if quantity == "kl" else 1.03),
            xlabel="network evaluations per chunk (NFE)",
            ylabel=quantity,
        )
        axis.grid(alpha=0.3)
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=3,
        fontsize=8,
        frameon=False,
    )
    figure.savefig(file, dpi=110)


def show(name, table, done, args):
    """Print a table of evidence.measure()'s results, and draw it; 1 if any are missing, else 0."""
    found = {row: done[row] for row in table.rows if done[row]}
    print(f"\n{name}: {' / '.join(table.quantities)}, mean over seeds (lowest-highest)\n")
    print(markdown(found, table.quantities, args.nfe))
    draw(found, table.quantities, args.nfe, args.out / f"{name}.png")
    measured = sum(len(of_seeds) for of_seeds in found.values())
    return int(measured < len(table.rows) * len(args.seeds))
