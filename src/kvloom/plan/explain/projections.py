"""Weights of the projections under each attention variant."""

from kvloom.plan.explain.explanation import Explanation, attending, count
from kvloom.plan.figure import Figure
from kvloom.plan.question import Question
from kvloom.spec.hypothetical import attention_variants
from kvloom.units import format_bytes


def projections(asked: Question) -> Explanation:
    """Count the weights of q, k, v and o (and of MLA's low-rank pairs) in one layer, as is and in other variants."""
    attending(asked, "projections")
    rows, figures = [], {}
    for name, model in attention_variants(asked.model):
        index = model.kv_layers[0]
        parts = model.layers[index].mixer.projections(model.hidden_size)
        total = sum(parts.values())
        per_token = model.kv_spec(asked.block_size, asked.native_store).bytes_per_token
        shown = ", ".join(f"{part} {count(n)}" for part, n in parts.items())
        rows.append((name, shown, count(total), format_bytes(per_token)))
        key = name.split(" ")[0].lower().replace("-", "_") + ("_model" if "the model" in name else "")
        figures[f"params_{key}"] = Figure(total, "weights", "exact", "of one layer's attention")
        figures[f"kv_{key}"] = Figure(per_token, "bytes", "exact", "per token, all layers")
    hidden = asked.model.hidden_size
    return Explanation(
        "projections",
        f"Projections of one layer, width {hidden} ({asked.model.name})",
        (
            "Queries and output are projected for every query head; keys and values only for every KV head. So "
            "fewer KV "
            "heads shrink both the weights of k and v and, above all, the cache.",
            "MLA keeps one latent for all heads: k and v are rebuilt from it by one more matrix (kv_up), which "
            "decode folds "
            "into q and o.",
            "Every variant but the model itself would have to be trained.",
        ),
        ("attention", "weights of each projection", "together", "KV per token"),
        tuple(rows),
        figures,
    )
