"""Conflicts: why the parts of a policy do not go together, by their rows."""

from kvloom.spec.method import METHODS
from kvloom.spec.policy import FULL, PolicySpec


def conflicts(policy: PolicySpec) -> list[str]:
    """Return every reason why the parts of a policy do not go together."""
    reasons = []
    name, row, refining = policy.selector.name, policy.method, policy.refinements
    if policy.when.chunk is not None and "chunk" not in row.acts:
        reasons.append(f"{name} scores whole prompts; it cannot act per chunk")
    if policy.when.while_decoding and "decode" not in row.acts:
        reasons.append(f"{name} is defined at the end of the prompt; it cannot act while generating")
    if row.chooses and refining:
        reasons.append(f"{name} chooses tokens itself; there is no score to refine")
    choosing = [term.name for term in refining if METHODS.get(term.name).chooses]
    if len(choosing) > 1:
        reasons.append(f"{' and '.join(choosing)} each choose the tokens; keep one")
    if not row.chooses and not row.attention:
        for term in refining:
            if METHODS.get(term.name).attention:
                reasons.append(f"{term.name} weighs attention, and scores of {name} are not")
    if policy.moved_sinks is not None and not policy.sharing.even:
        reasons.append("positions=cache needs lanes of equal length")
    if policy.moved_sinks is not None and policy.action != FULL.action:
        reasons.append("positions=cache rewrites the sinks; it cannot be combined with merging")
    return reasons
