"""The work of generating text with and without a cache."""

from kvloom.plan.explain.explanation import Explanation, count
from kvloom.plan.figure import Figure
from kvloom.plan.operations import Operations, causal_pairs
from kvloom.plan.question import Question
from kvloom.spec.layer import Attention, Latent


def generation(asked: Question) -> Explanation:
    """Count tokens sent through the projections, and operations, of one request with and without a KV cache.

    Without a cache, the step that makes token t+1 projects all t tokens before it again: from one token on, n steps
    project n(n+1)/2 tokens; with a cache each token is projected once.
    """
    prompt, output = asked.prompt, max(1, asked.output)
    steps = range(prompt, prompt + output)
    without, cached = sum(steps), prompt + output - 1
    model, work = asked.model, Operations(asked)
    pairs: dict[tuple[object, int | None], int] = {}
    for layer in model.layers:
        pairs[(layer.mixer, layer.window)] = pairs.get((layer.mixer, layer.window), 0) + 1
    heavy = 2.0 * (model.layer_matrix_params * without + model.head_params * output)
    for (mixer, window), number in pairs.items():
        each = mixer.expanded_flops(1) if isinstance(mixer, Latent) else 0.0
        if isinstance(mixer, Attention):
            each = mixer.attention_flops(1)
        heavy += number * each * sum(causal_pairs(t, window) for t in steps) if each else 0.0
    light = work.prefill_flops(prompt) + sum(work.decode_flops(prompt, made) for made in range(1, output))
    long = prompt + output
    triangle = long * (long + 1) // 2
    return Explanation(
        "generation",
        f"{output} tokens after a prompt of {prompt}, with and without a cache ({model.name})",
        (
            f"Without a cache, step by step, {count(without)} tokens go through every projection of the model: each "
            "new "
            "token needs the keys and values of all tokens before it, and they are computed again.",
            f"With a cache each token goes through once: {count(cached)} in all, {without / cached:,.1f} times fewer.",
            f"From a single token on, {long} steps without a cache project n(n+1)/2 = {count(triangle)} tokens, "
            "with one "
            f"n = {long}.",
            f"In operations: {heavy:.3e} without, {light:.3e} with, {heavy / light:,.1f} times fewer. Attention "
            "itself still "
            "reads all keys at every step, so it stays quadratic over the whole text.",
        ),
        ("", "tokens projected", "operations"),
        (("without a cache", count(without), f"{heavy:.4g}"), ("with a cache", count(cached), f"{light:.4g}")),
        {
            "projected_without_cache": Figure(without, "tokens", "exact"),
            "projected_with_cache": Figure(cached, "tokens", "exact"),
            "flops_without_cache": Figure(heavy, "FLOP", "exact" if model.exact else "assumed"),
            "flops_with_cache": Figure(light, "FLOP", "exact" if model.exact else "assumed"),
        },
    )
