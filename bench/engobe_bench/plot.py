"""Lines over logarithmic axes, as SVG."""

import math
from xml.sax.saxutils import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 460, 64, 20, 40, 50
COLOURS = ("#b4552d", "#8a8a8a", "#2d6cb4", "#3c8a4e")


def lines(title, x_label, series):
    """`series`: (name, [(x, y)], dashed). Both axes are logarithmic, so what grows in proportion has slope one."""
    xs = [x for _, points, _ in series for x, _ in points]
    ys = [y for _, points, _ in series for _, y in points]
    low, high = math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys)))
    left, right = math.log2(min(xs)), math.log2(max(xs))

    def at(x, y):
        u = (math.log2(x) - left) / max(right - left, 1e-9)
        v = (math.log10(y) - low) / max(high - low, 1e-9)
        return LEFT + u * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - v * (HEIGHT - TOP - BOTTOM)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{WIDTH / 2}" y="20" text-anchor="middle" font-size="14">{escape(title)}</text>',
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 12}" text-anchor="middle">{escape(x_label)}</text>',
    ]
    for x in sorted(set(xs)):
        px, py = at(x, 10**low)
        out.append(f'<line x1="{px:.1f}" y1="{TOP}" x2="{px:.1f}" y2="{py:.1f}" stroke="#eee"/>')
        out.append(f'<text x="{px:.1f}" y="{py + 16:.1f}" text-anchor="middle">{x:g}</text>')
    for power in range(low, high + 1):
        for factor in (1, 2, 5) if power < high else (1,):
            px, py = at(min(xs), factor * 10**power)
            out.append(f'<line x1="{px:.1f}" y1="{py:.1f}" x2="{WIDTH - RIGHT}" y2="{py:.1f}" stroke="#eee"/>')
            out.append(f'<text x="{px - 6:.1f}" y="{py + 4:.1f}" text-anchor="end">{factor * 10**power:g}</text>')
    for i, (name, points, dashed) in enumerate(series):
        colour, dash = COLOURS[i % len(COLOURS)], ' stroke-dasharray="5 4"' if dashed else ""
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in (at(*p) for p in points))
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        if not dashed:
            out += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="{colour}"/>' for px, py in (at(*p) for p in points)]
        y = TOP + 14 + 18 * i
        out.append(f'<line x1="{LEFT + 12}" y1="{y - 4}" x2="{LEFT + 40}" y2="{y - 4}" stroke="{colour}" stroke-width="2"{dash}/>')
        out.append(f'<text x="{LEFT + 46}" y="{y}">{escape(name)}</text>')
    return "\n".join([*out, "</svg>\n"])
