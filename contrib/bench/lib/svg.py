"""The picture: how each goal is met, as a bar to the right of the line where it is just met, or to the left of it."""
import math
from html import escape

from catalogue import all_goals
from report import heading, number

WIDTH, LEFT, RIGHT, TOP, BAR, PITCH, GAP = 960, 400, 150, 64, 8, 11, 7
# Bars end there, and say so with an open end.
FURTHEST = 8.0
TICKS = (0.125, 0.25, 0.5, 1, 2, 4, 8)
STYLE = """
text { font: 11px sans-serif; fill: #57606a }
.head { font-size: 14px; font-weight: bold }
.small { font-size: 10px }
.grid { stroke: #8c959f; stroke-opacity: .3 }
.one { stroke: #57606a; stroke-width: 1.5 }
.met { fill: #2da58e }
.missed { fill: #d9822b }
.tmpfs { fill-opacity: .55 }
.other { stroke: #57606a; stroke-width: 1.5 }
@media (prefers-color-scheme: dark) { text { fill: #9aa4af } .one, .other { stroke: #9aa4af } }
"""


def _x(score):
    share = math.log2(min(max(score, 1 / FURTHEST), FURTHEST)) / math.log2(FURTHEST)
    middle = LEFT + (WIDTH - LEFT - RIGHT) / 2
    return middle + share * (WIDTH - LEFT - RIGHT) / 2


def _text(x, y, text, anchor="start", kind=""):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(text)}</text>'


def _line(x, top, bottom, kind):
    return f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}" class="{kind}"/>'


def _rows(verdicts, titles):
    """Verdicts of each goal by medium, in the order of goals; more may be asked on tmpfs, in the same row."""
    label = lambda goal: f"{titles[goal.case]} / {goal.text}"
    rows = {label(goal): {} for goal in all_goals()}
    for verdict in verdicts:
        medium = "tmpfs" if verdict.setup["medium"] == "tmpfs" else "disk"
        rows[label(verdict.asked)].setdefault(medium, []).append(verdict)
    return {name: media for name, media in rows.items() if media}


def _bar(verdicts, y, medium):
    """The worst of a medium's setups as a bar, the others as ticks."""
    worst, *others = sorted(verdicts, key=lambda verdict: verdict.score)
    start, end = sorted((_x(1), _x(worst.score)))
    kind = "met" if worst.score >= 1 else "missed"
    sign = "of" if worst.goal.least is not None else "of max"
    what = " ".join(f"{key}={value}" for key, value in worst.setup.items())
    parts = [
        f'<rect x="{start:.1f}" y="{y:.1f}" width="{max(end - start, 1):.1f}" height="{BAR}" class="{kind} {medium}">'
        f"<title>{escape(what)}</title></rect>",
        _text(WIDTH - RIGHT + 8, y + BAR, f"{medium} {number(worst.value)} {sign} {worst.goal.bound:g}", kind="small"),
    ]
    return parts + [_line(_x(verdict.score), y, y + BAR, "other") for verdict in others]


def draw(metas, verdicts, titles):
    """The picture as SVG text."""
    rows = _rows(verdicts, titles)
    body, y = [], TOP
    for label, media in rows.items():
        body.append(_text(LEFT - 8, y + PITCH * len(media) / 2 + 3, label, "end"))
        for medium in sorted(media):
            body += _bar(media[medium], y, medium)
            y += PITCH
        y += GAP
    grid = [_line(_x(tick), TOP - 6, y, "one" if tick == 1 else "grid") for tick in TICKS]
    scale = [_text(_x(tick), TOP - 10, "target" if tick == 1 else f"{tick:g}", "middle", "small") for tick in TICKS]
    head = [_text(8, 20, "fleecefs: what was measured, relative to its target", kind="head")]
    head.append(_text(8, 36, heading(metas), kind="small"))
    legend = "bars: the worst of raw and qcow2, page cache and O_DIRECT; ticks: the others"
    head.append(_text(8, y + 14, legend, kind="small"))
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + 24:.0f}" width="{WIDTH}">',
                      f"<style>{STYLE}</style>", *head, *scale, *grid, *body, "</svg>"]) + "\n"
