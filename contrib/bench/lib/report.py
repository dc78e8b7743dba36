"""Tables in Markdown, from records."""
import statistics
from dataclasses import replace

from catalogue import all_cases, all_goals
from goals import judge


def setups_of(records):
    """The setups that records come from, as said in them, in order."""
    return list({tuple(sorted(record["setup"].items())): record["setup"] for record in records}.values())


def said(setup):
    """A setup in words."""
    return f"{setup['format']} on {setup['medium']}, cache={setup['cache']}"


def number(value):
    """As many digits as are worth reading."""
    if value >= 10000:
        return f"{value / 1000:.1f}k"
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _cell(records, unit):
    middle = lambda figure: statistics.median([record[figure] for record in records if record.get(figure)] or [0])
    details = [f"p99 {number(middle('p99_us'))}"] if middle("p99_us") else []
    details += [f"cpu {number(middle('cpu_us'))}"] if middle("cpu_us") else []
    details += [f"worst {number(middle('worst_ms'))}"] if middle("worst_ms") else []
    details += [f"the guests' worst write {number(middle('max_us') / 1e3)}"] if unit == "median_ms" else []
    details += [f"reader {number(middle('reader_mbs'))} MB/s"] if middle("reader_mbs") else []
    return (number(middle(unit)) if middle(unit) else "") + (f" ({', '.join(details)})" if details else "")


def _table(rows):
    head, *rest = rows
    return "\n".join(["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rest]])


UNITS = {"iops": "IOPS", "mbs": "MB/s", "median_ms": "ms", "vmrss_mib": "MiB", "seconds": "s"}


def figures(records, setup):
    """Medians of every line of every case; in brackets the p99 and the server's processor time for one operation."""
    rows = [["work", "medians (p99, and cpu of the server for one operation, in us)"]]
    mine = [record for record in records if record["setup"] == setup]
    for case in all_cases():
        of_case = [record for record in mine if record["case"] == case.name]
        lines = list(dict.fromkeys(record["line"] for record in sorted(of_case, key=lambda record: record["at"])))
        cells = [f"{line} {_cell([r for r in of_case if r['line'] == line], case.unit)}" for line in lines]
        if cells:
            rows.append([f"{case.title}, {UNITS[case.unit]}", "; ".join(cells)])
    return _table(rows) if len(rows) > 1 else ""


def verdicts(records, setup=None):
    """How each goal stands, in one setup or in all."""
    found = []
    for one in [setup] if setup else setups_of(records):
        mine = [record for record in records if record["setup"] == one]
        for goal in all_goals():
            of_case = [record for record in mine if record["case"] == goal.case]
            verdict = judge(goal, one, of_case) if goal.fits(one) else None
            if verdict:
                found.append(verdict)
    return found


def titles():
    """What cases are called, by name."""
    return {case.name: case.title for case in all_cases()}


def _limit(records, verdict, line):
    """The ratio that another line reaches in our place: what can be had at all."""
    goal = replace(verdict.goal, over=line, instead=None)
    mine = [record for record in records if record["setup"] == verdict.setup and record["case"] == goal.case]
    if goal.under in (None, line, "ours, alone") or goal.share:
        return ""
    other = judge(goal, verdict.setup, mine)
    return number(other.value) if other else ""


def goals_table(records, setup):
    """The goals of one setup; beside our ratio those of the forwarder and of the bare file."""
    rows = [["work", "against", "ours", "theirs", "ratio", "wanted", "", "forwarder's", "bare file's", "rounds"]]
    for verdict in verdicts(records, setup):
        goal = verdict.goal
        against = goal.text if goal.text != "QEMU" else verdict.against
        rows.append([titles()[goal.case], against, number(verdict.over),
                     number(verdict.under) if verdict.under is not None else "-",
                     f"{verdict.value:.2f}" if verdict.under is not None else "-",
                     goal.wanted, "met" if verdict.score >= 1 else f"**{verdict.score:.2f}**",
                     _limit(records, verdict, "forwarder"), _limit(records, verdict, "bare"), str(verdict.rounds)])
    return _table(rows) if len(rows) > 1 else ""


def summary(records):
    """A line a goal, a column a setup: ratios or figures, bold where the goal is missed."""
    setups = setups_of(records)
    found = {}
    for verdict in verdicts(records):
        text = number(verdict.value) + (f" of {verdict.against}" if verdict.goal is not verdict.asked else "")
        cell = text if verdict.score >= 1 else f"**{text}**"
        found.setdefault(_place(verdict.asked), {})[said(verdict.setup)] = cell
    rows = [["work", "against", "wanted", *map(said, setups)]]
    for goal in all_goals():
        if cells := found.get(_place(goal)):
            rows.append([titles()[goal.case], goal.text, goal.wanted, *(cells.get(said(one), "") for one in setups)])
    return _table(rows)


def _place(goal):
    return goal.case, goal.text, goal.bound


def _range(values):
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def heading(metas):
    """What was measured, on what, when."""
    each = lambda texts: ", ".join(dict.fromkeys(texts))
    return "; ".join([
        each([f"fleecefs {meta['fleecefs']}" for meta in metas] + [qemu for meta in metas for qemu in meta["qemus"]]
             + [f"fio {meta['fio']}" for meta in metas]),
        each(f"Linux {meta['kernel']}, {meta['cpus']} processors, {meta['memory_gib']} GiB" for meta in metas),
        each(meta["date"] for meta in metas),
        f"runs of {_range([meta['seconds'] for meta in metas])} s, disks of {_range([m['mib'] for m in metas])} MiB",
    ])


def short(metas, records):
    """What was measured, and the summary."""
    return f"{heading(metas)}\n\n{summary(records)}"


def markdown(metas, records):
    """All of it."""
    parts = [short(metas, records)]
    for setup in setups_of(records):
        for title, table in ((f"### {said(setup)}", goals_table(records, setup)), ("", figures(records, setup))):
            if table:
                parts += [title, table] if title else [table]
    return "\n\n".join(parts) + "\n"
