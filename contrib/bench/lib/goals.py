"""What is wanted: each goal compares lines of one case, or holds a figure against a bound."""
import statistics
from dataclasses import dataclass


@dataclass
class Goal:
    """`over / under >= least` (or `<= most`), of the figure `figure` of two of a case's lines.

    `under` may be `qemu`: then the best of QEMU's lines, which all begin so. Without it the figure itself is held
    against the bound, less that of the line `minus`. With `share` a line's figure is the part that it keeps of that of
    its own line 'NAME, alone'. A goal is also met where the one in `instead` is.
    """

    case: str
    text: str
    figure: str
    under: str = None
    least: float = None
    most: float = None
    over: str = "ours"
    media: tuple = ("disk", "tmpfs")
    formats: tuple = ("raw", "qcow2")
    share: bool = False
    minus: str = None
    instead: object = None

    @property
    def bound(self):
        """The figure that is aimed at."""
        return self.least if self.least is not None else self.most

    @property
    def wanted(self):
        """The bound in words."""
        return f"{'at least' if self.least is not None else 'at most'} {self.bound:g}"

    def fits(self, setup):
        """Whether it is asked of this setup."""
        medium = "tmpfs" if setup["medium"] == "tmpfs" else "disk"
        return medium in self.media and setup["format"] in self.formats

    def score(self, value):
        """How far a ratio or figure meets it: 1 and more is met."""
        if self.least is not None:
            return value / self.least
        return self.most / value if value > 0 else float("inf")


@dataclass
class Verdict:
    """A goal, and what was measured. `asked` is another goal where this one stands `instead` of it."""

    goal: Goal
    asked: Goal
    setup: dict
    value: float
    over: float
    under: float
    against: str
    rounds: int

    @property
    def score(self):
        """How far the goal is met."""
        return self.goal.score(self.value)


def _rounds(records, goal, line):
    """Figure by round of a line."""
    found = {}
    for record in records:
        if record["line"] == line and goal.figure in record:
            found[record["round"]] = record[goal.figure]
    if goal.minus == line:
        return found
    if goal.minus:
        less = _rounds(records, goal, goal.minus)
        return {number: value - less[number] for number, value in found.items() if number in less}
    if not goal.share:
        return found
    alone = {record["round"]: record[goal.figure] for record in records if record["line"] == f"{line}, alone"}
    return {number: value / alone[number] for number, value in found.items() if alone.get(number)}


def _against(records, goal, line):
    over, under = _rounds(records, goal, goal.over), _rounds(records, goal, line)
    both = sorted(number for number in over.keys() & under.keys() if under[number])
    if not both:
        return None
    middle = lambda values: statistics.median([values[number] for number in both])
    ratio = statistics.median([over[number] / under[number] for number in both])
    return Verdict(goal, goal, None, ratio, middle(over), middle(under), line, len(both))


def judge(goal, setup, records):
    """The verdict from a case's records in one setup, or None where a line is missing. Ratios are taken within rounds;
    of several QEMUs, the one that leaves us worst counts."""
    if goal.under is None:
        over = _rounds(records, goal, goal.over)
        if not over:
            return None
        value = statistics.median(over.values())
        return Verdict(goal, goal, setup, value, value, None, "", len(over))
    lines = {record["line"] for record in records}
    if goal.under == "qemu":
        rivals = [line for line in lines if line.startswith("qemu") and not line.endswith(", alone")]
    else:
        rivals = [goal.under]
    verdicts = [verdict for line in sorted(rivals) if (verdict := _against(records, goal, line))]
    if not verdicts:
        return None
    worst = min(verdicts, key=lambda verdict: verdict.score)
    worst.setup = setup
    if goal.instead and goal.instead.fits(setup):
        other = judge(goal.instead, setup, records)
        if other and other.score > worst.score:
            other.asked = goal
            return other
    return worst


def all_goals():
    """In the order of the cases."""
    goals = []
    for work in ("write", "read"):
        for depth, least in (("d1", 1.0), ("d16", 2.0), ("j4", 2.0)):
            case = f"live-{work}-{depth}"
            goals += [Goal(case, "QEMU", "iops", "qemu", least), Goal(case, "the forwarder", "iops", "forwarder", 0.95),
                      Goal(case, "raw", "iops", "ours, raw", 0.9, formats=("qcow2",))]
    for depth in ("d1", "d16"):
        case = f"touch-4k-{depth}"
        goals += [Goal(case, "QEMU", "iops", "qemu", 5), Goal(case, "p99, QEMU", "p99_us", "qemu", most=0.2),
                  Goal(case, "no snapshot", "iops", "ours, no snapshot", 0.45)]
    for case in ("touch-64k-d1", "touch-64k-d16", "touch-1M-d1", "touch-1M-d4"):
        goals.append(Goal(case, "QEMU", "iops", "qemu", 1.5))
    for depth in ("d1", "d16"):
        goals.append(Goal(f"rewrite-{depth}", "no snapshot", "iops", "ours, no snapshot", 0.97))
    for way in ("psync", "d4", "buffered"):
        case = f"view-{way}"
        # Through the page cache the bare file's figure depends on what is cached.
        bare = Goal(case, "the bare file", "mbs", "bare", 0.9) if way != "buffered" else None
        goals += [Goal(case, "QEMU", "mbs", "qemu", 1.5, media=("disk",), instead=bare),
                  Goal(case, "QEMU", "mbs", "qemu", 4, media=("tmpfs",))]
    goals.append(Goal("beside-d16", "reader, QEMU's", "reader_mbs", "qemu", 2))
    for depth in ("d1", "d16"):
        goals.append(Goal(f"beside-{depth}", "share kept, bare", "iops", "bare", 0.9, share=True))
    goals += [Goal("beside-d1", "guest, QEMU's", "iops", "qemu", 2),
              Goal("beside-d1", "guest, alone", "iops", "ours, alone", 0.5)]
    for depth in ("d1", "d16"):
        goals.append(Goal(f"snapshots-{depth}", "one of them", "iops", "ours, 1 snapshot", 0.9,
                          over="ours, 8 snapshots"))
    for depth in ("d1", "d16"):
        for count, least in ((1, 0.99), (8, 0.98), (64, 0.95)):
            goals.append(Goal(f"bitmaps-{depth}", f"{count} of them, none", "iops", "ours", least,
                              over=f"ours, {count} bitmaps"))
    goals += [
        Goal("freeze", "guest held, median, ms", "median_ms", most=1.0),
        Goal("freeze", "guest held, worst, ms", "worst_ms", most=10.0),
        Goal("memory", "idle with a checkpoint, MiB", "vmrss_mib", most=13.0),
        Goal("memory", "after a load, MiB", "vmrss_mib", most=64.0, over="ours, after a load"),
        Goal("memory", "idle, QEMU", "vmrss_mib", "qemu", most=1.0),
        Goal("memory", "what a snapshot adds, MiB", "vmrss_mib", most=33.0, over="ours, all over with a snapshot",
             minus="ours, all over"),
        Goal("mount-qcow2", "seconds", "seconds", most=0.5),
        Goal("mount-raw", "seconds", "seconds", most=0.2),
    ]
    return goals
