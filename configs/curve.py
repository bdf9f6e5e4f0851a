"""loss_curve.svg in a run's folder, drawn from its metrics.jsonl without any package.

    python -m configs.curve RUN_DIR
"""

import bisect
import json
import math
import os
import sys
from pathlib import Path

WIDTH, LEFT, RIGHT, PANEL, SPACE = 960, 82, 178, 190, 52  # pixels; of each panel, and below it
POINTS = 1500  # of a curve at most; more are averaged
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#e377c2", "#17becf")


def read_metrics(path):
    """The newest line of every step, in order of the steps; torn or foreign lines are left out."""
    lines = {}
    try:
        texts = Path(path).read_text(errors="replace").splitlines()
    except OSError:  # not there yet, or not to be read
        return []
    for text in texts:
        try:
            line = json.loads(text)
            lines[line["step"]] = line
        except (ValueError, KeyError, TypeError):  # cut off by a crash or a full disk
            continue
    return [lines[step] for step in sorted(lines)]


def is_number(value):
    return type(value) in (int, float) and math.isfinite(value)


def series(lines, key):
    """[(step, value)] of the lines that have a finite value."""
    return [(line["step"], line[key]) for line in lines if is_number(line.get(key))]


def smooth(points, span=0.02):
    """Averages over a window of steps that is a part `span` of them all, each centred."""
    half = max(2, round(len(points) * span / 2))
    sums = [0.0]
    for _, value in points:
        sums.append(sums[-1] + value)
    out = []
    for i, (step, _) in enumerate(points):
        low, high = max(0, i - half), min(len(points), i + half + 1)
        out.append((step, (sums[high] - sums[low]) / (high - low)))
    return out


def thin(points):
    """At most POINTS points, each the mean of its neighbours."""
    size = -(-len(points) // POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)] if size > 1 else []
    means = [tuple(sum(column) / len(group) for column in zip(*group)) for group in groups]
    return means or points


def ticks(low, high, log=False):
    """Round numbers from low to high: three to seven of them."""
    if log:
        exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for digits in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)):
            found = [d * 10.0**e for e in exponents for d in digits if low <= d * 10.0**e <= high]
            if len(found) >= 3:
                return found[:: -(-len(found) // 7)]
    step = 10.0 ** math.floor(math.log10((high - low) / 3))
    step = max(s for s in (step, 2 * step, 5 * step) if (high - low) / s >= 3 or s == step)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def words(value):
    """A number as an axis shows it."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.10g}" if abs(value - round(value, 6)) < 1e-12 else f"{value:.4g}"
    return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e+")


def bounds(curves, log):
    """(low, high) of a panel's values with a margin; the extreme hundredth does not set the scale.
    """
    values = sorted(v for _, points, *_ in curves for _, v in points)
    low, high = values[len(values) // 200], values[-1 - len(values) // 200]
    if log:
        margin = max(1.05, (high / low) ** 0.05)
        return low / margin, high * margin
    margin = 0.05 * (high - low) or 0.5 * abs(high) or 1.0
    return low - margin, high + margin


def panel(top, title, curves, last, resumes):
    """SVG elements of one panel: curves are (label, [(step, value)], colour, width, opacity)."""
    values = [value for _, points, *_ in curves for _, value in points]
    log = min(values) > 0 and max(values) > 4 * min(values) and title != "learning rate"
    low, high = bounds(curves, log)
    scale = math.log if log else float
    right, bottom = WIDTH - RIGHT, top + PANEL

    def x(step):
        return LEFT + (right - LEFT) * step / last

    def y(value):
        value = min(max(value, low), high)
        return bottom - PANEL * (scale(value) - scale(low)) / (scale(high) - scale(low))

    out = [f'<text x="{LEFT}" y="{top - 8}" class="title">{title}{", log scale" if log else ""}'
           '</text>']
    for value in ticks(low, high, log):
        out += [f'<path d="M{LEFT} {y(value):.1f}H{right}" class="grid"/>',
                f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" class="left">{words(value)}</text>']
    for step in ticks(0, last):
        out += [f'<path d="M{x(step):.1f} {top}V{bottom}" class="grid"/>',
                f'<text x="{x(step):.1f}" y="{bottom + 16}" class="below">{words(step)}</text>']
    for step in resumes:
        out.append(f'<path d="M{x(step):.1f} {top}V{bottom}" class="resume"/>')
    out.append(f'<path d="M{LEFT} {top}V{bottom}H{right}" class="axis"/>')
    for i, (name, points, colour, width, opacity) in enumerate(curves):
        places = [f"{x(step):.1f} {y(value):.1f}" for step, value in thin(points)]
        if len(places) == 1:
            px, py = places[0].split()
            out.append(f'<circle cx="{px}" cy="{py}" r="3" fill="{colour}"/>')
        out.append(f'<path d="M{"L".join(places)}" fill="none" stroke="{colour}" '
                   f'stroke-width="{width}" stroke-opacity="{opacity}" stroke-linejoin="round"/>')
        out += [f'<path d="M{right + 10} {top + 8 + 16 * i}h18" stroke="{colour}" '
                f'stroke-width="{max(width, 2)}" stroke-opacity="{opacity}"/>',
                f'<text x="{right + 34}" y="{top + 12 + 16 * i}">{name}</text>']
    return out


def panels(lines):
    """[(title, curves)] of what the lines hold, curves as in `panel`."""
    blue, red = COLOURS[:2]

    def with_mean(points, averaged, name):
        if len(points) < 10:
            return [(name, points, blue, 2, 1)]
        return [(name, points, blue, 1, 0.35), ("smoothed", smooth(averaged), blue, 2, 1)]

    trained = [line for line in lines if line["step"] > 0]
    norm, seconds = series(lines, "grad_norm"), series(lines, "seconds")
    loss = with_mean(series(trained, "loss"), series(trained, "loss_mean"), "training loss")
    loss += [("validation loss", series(lines, "val_loss"), red, 2, 1),
             ("predicting zero", series(lines, "val_zero"), "#999999", 1.5, 1)]
    grid = next((line["val_sigmas"] for line in lines if line.get("val_sigmas")), [])
    levels = []
    for i, sigma in enumerate(grid):
        points = [(line["step"], line["val_losses"][i]) for line in lines
                  if len(line.get("val_losses") or ()) > i and is_number(line["val_losses"][i])]
        levels.append((f"sigma {sigma:.3g}", points, COLOURS[i % len(COLOURS)], 1.5, 1))
    found = [("loss", loss), ("validation loss at each noise level", levels),
             ("PSNR of the samples to the real clips, dB",
              [("psnr", series(lines, "psnr"), blue, 2, 1)]),
             ("learning rate", [("lr", series(lines, "lr"), blue, 2, 1)]),
             ("gradient norm", with_mean(norm, norm, "before clipping")),
             ("seconds a step", with_mean(seconds, seconds, "seconds"))]
    found = [(title, [curve for curve in curves if curve[1]]) for title, curves in found]
    return [(title, curves) for title, curves in found if curves]


def svg(lines, name=""):
    """The picture as text; `lines` as `read_metrics` gives them."""
    last = max((line["step"] for line in lines), default=0) or 1
    shown = panels(lines)
    resumes = [line["resumed_at"] for line in lines if is_number(line.get("resumed_at"))]
    height = 64 + len(shown) * (PANEL + SPACE)
    note = f"{name}, step {last:,}" + (f", dashed: {len(resumes)} resumes" if resumes else "")
    note = note.replace("&", "&amp;").replace("<", "&lt;")
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
           f'viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="12">',
           "<style>.grid{stroke:#e4e4e4} .axis{stroke:#333;fill:none} .left{text-anchor:end} "
           ".below{text-anchor:middle} .title{font-size:14px;font-weight:bold} "
           ".resume{stroke:#333;stroke-dasharray:3 3}</style>",
           f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
           f'<text x="{LEFT}" y="22">{note}</text>']
    for i, (title, curves) in enumerate(shown):
        out += panel(58 + i * (PANEL + SPACE), title, curves, last, resumes)
    right = WIDTH - RIGHT
    out.append(f'<text x="{right}" y="{height - 12}" class="left">step</text></svg>')
    return "\n".join(out) + "\n"


def draw(run_dir):
    """Draw loss_curve.svg anew; returns its path."""
    run_dir = Path(run_dir)
    path = run_dir / "loss_curve.svg"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(svg(read_metrics(run_dir / "metrics.jsonl"), run_dir.name))
    os.replace(temporary, path)  # who looks at it never sees half of one
    return path


def open_board(run_dir):
    """TensorBoard's writer, with the run's config in it."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ImportError("it is not installed; pip install tensorboard") from None
    board = SummaryWriter(Path(run_dir) / "tensorboard")
    board.add_text("config", f"```\n{Path(run_dir, 'config.yaml').read_text()}```")
    return board


def show_on_board(board, line, run_dir):
    """A line of metrics.jsonl, and the contact sheet if samples were made at its step."""
    step = line["step"]
    for key, value in line.items():
        if is_number(value) and key != "step":
            board.add_scalar(key, value, step)
    for sigma, loss in zip(line.get("val_sigmas", ()), line.get("val_losses", ())):
        board.add_scalar(f"val_loss/sigma_{sigma:.3g}", loss, step)
    sheet = Path(run_dir) / "samples" / f"iter_{step:09d}.png"
    if "solver_s" in line and sheet.is_file():
        from configs.pictures import read_png  # needs the trainer; the curves do not
        board.add_image("samples", read_png(sheet), step, dataformats="HWC")
    board.flush()


def main(arguments):
    """Exit status: 0, or 2 for a mistake that a sentence on stderr explains."""
    if len(arguments) != 1 or not Path(arguments[0], "metrics.jsonl").is_file():
        print("usage: python -m configs.curve RUN_DIR, the folder of a run with its metrics.jsonl",
              file=sys.stderr)
        return 2
    print(draw(arguments[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
