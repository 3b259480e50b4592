"""The distance over which stacked windows pass information."""

from kvloom.plan.explain.explanation import Explanation, attending, count
from kvloom.plan.figure import Figure
from kvloom.plan.question import Question


def reach(asked: Question) -> Explanation:
    """Return how many tokens before the last one can influence it, layer by layer.

    A window of w tokens counts the query itself, so one layer passes information on over w - 1 tokens; a layer without
    a window passes it on from any token.
    """
    attending(asked, "reach")
    layers = asked.model.layers
    windows = [layer.window for layer in layers]
    local = [window for window in windows if window is not None]
    rows: list[tuple[str, ...]] = []
    total: int | None = 0
    for index, window in enumerate(windows):
        total = None if window is None or total is None else total + window - 1
        if index < 6 or index == len(windows) - 1:
            shown = "everything" if total is None else count(total)
            rows.append((str(index), "all" if window is None else count(window), shown))
    far = sum(window - 1 for window in local)
    full = len(windows) - len(local)
    lines = [
        f"{len(local)} of {len(windows)} layers read a window, {full} read everything.",
        "A layer with a window of w tokens carries information w - 1 tokens; layers add up, because a token's state "
        "already "
        "holds what its own window saw one layer below.",
    ]
    if not local:
        lines.append("No layer has a window: every token reaches every earlier one in the first layer.")
    elif full:
        first = windows.index(None)
        lines.append(f"Layer {first} reads everything, so from there on nothing is out of reach; the windowed "
                     "layers alone "
                     f"would reach {count(far)} tokens.")
    else:
        lines.append(f"Together they reach at most {count(far)} tokens, in theory: what arrives has passed through "
                     "every layer "
                     "on the way.")
    context = asked.context
    saved = sum(1 for window in local if window < context)
    lines.append(f"At {count(context)} tokens, {saved} layers hold only their window in the cache.")
    figures = {"reach_of_windows": Figure(far, "tokens", "exact", "sum of window - 1 over windowed layers")}
    return Explanation("reach", f"The reach of windows over layers ({asked.model.name})", tuple(lines),
                       ("layer", "window", "reach after it"), tuple(rows), figures)
