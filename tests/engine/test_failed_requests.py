"""A request whose numbers or whose own code fail ends alone, and says why."""

import pytest
import torch

from harness.tiny_engine import finish, greedy, nothing_left, tiny_engine
from harness.tiny_model import random_weights, tiny_config
from kvloom.attention.reference import ReferenceBackend
from kvloom.cache.kvcache import KVCache
from kvloom.cli.answer import Answer
from kvloom.engine.beam import BeamSearchParams
from kvloom.engine.engine import Engine
from kvloom.engine.runner import Runner
from kvloom.engine.scheduler import Scheduler
from kvloom.errors import RequestFailedError
from kvloom.models.compiled import CompiledModel
from kvloom.models.decoder import Decoder
from kvloom.models.eager import EagerModel, _best_tokens
from kvloom.spec.store import SLAB_BYTES

PROMPT = [3, 17, 98, 41, 5, 62, 17, 98] * 3
POISON = 210


class Processor:
    """A processor of the caller's that calls `change(output token ids, logits)`."""

    def __init__(self, change):
        self.change = change

    def start(self):
        """Return itself."""
        return self

    def __call__(self, prompt_token_ids, output_token_ids, logits):
        """Change the logits."""
        self.change(output_token_ids, logits)


def poisoned_engine(kind="eager", where="embed"):
    """Return an engine around a model that cannot embed the token `POISON`, or whose last layer overflows."""
    config = tiny_config("llama")
    weights = random_weights(config)
    if where == "embed":
        weights["embed"][POISON] = float("nan")
    else:
        weights[f"layers.{config.num_layers - 1}.mlp_norm"][:] = float("inf")
    if kind == "eager":
        model = EagerModel(Decoder(config, weights), ReferenceBackend())
    else:
        model = CompiledModel(config, weights.items(), torch.float32)
    cache = KVCache(config.kv_spec(16, "fp32"), 8 * SLAB_BYTES, 8, torch.float32, layout=model.layout)
    scheduler = Scheduler(cache.lanes, max_num_seqs=8, max_num_batched_tokens=64)
    return Engine(Runner(model, cache), scheduler, None, max_model_len=1024, eos_token_ids=())


@pytest.mark.parametrize("kind", ["eager", "cpu"])
def test_logits_that_are_not_finite_end_their_request_alone_with_an_error_that_names_the_layer(kind):
    engine = poisoned_engine(kind)
    bad, good = engine.add([*PROMPT, POISON], greedy(8)), engine.add([*PROMPT, 5], greedy(8))
    finish(engine)
    output = engine.output(bad)
    assert output.outputs[0].finish_reason == "error" and output.outputs[0].token_ids == []
    assert "not a finite number" in output.error and "layer 0 are the first" in output.error
    alone = tiny_engine(kind=kind)
    expected = alone.add([*PROMPT, 5], greedy(8))
    finish(alone)
    assert good.error is None and good.sequences[0].output_token_ids == expected.sequences[0].output_token_ids
    nothing_left(engine)


@pytest.mark.parametrize("kind", ["eager", "cpu"])
def test_where_all_keys_and_values_are_finite_the_error_says_so(kind):
    engine = poisoned_engine(kind, "last layer")
    request = engine.add(PROMPT, greedy(8))
    finish(engine)
    assert "the end of the last layer or the head" in str(request.error)
    nothing_left(engine)


def test_the_command_line_ends_with_the_error_after_what_there_is():
    engine = poisoned_engine()
    request = engine.add([*PROMPT, POISON], greedy(8))
    finish(engine)
    shown = Answer().follow(iter([engine.output(request)]))
    assert next(shown).error is not None
    with pytest.raises(RequestFailedError, match="not a finite number"):
        next(shown)


def test_nothing_of_a_request_that_is_not_finite_can_be_adopted_by_another():
    engine = poisoned_engine()
    prompt = [*PROMPT * 4, POISON]
    engine.add(prompt, greedy(4))
    finish(engine)
    assert len(engine.cache.index) == 0
    assert engine.add([*prompt, 3], greedy(1)).sequences[0].num_cached_tokens == 0
    finish(engine)


def test_beams_without_finite_logits_end_with_an_error():
    engine = poisoned_engine()
    request = engine.add_beam_search([*PROMPT, POISON], BeamSearchParams(beam_width=3, max_tokens=6))
    finish(engine)
    assert "not a finite number" in str(request.error)
    assert {s.finish_reason for s in request.sequences} == {"error"}
    nothing_left(engine)


def test_all_samples_of_a_request_end_when_one_of_them_fails():
    engine = tiny_engine()

    def fails(tokens, logits):
        if len(tokens) == 2:
            raise RuntimeError("lost")

    request = engine.add(PROMPT, greedy(8, n=3, logits_processors=(Processor(fails),)))
    other = engine.add(PROMPT, greedy(8))
    finish(engine)
    assert "logits processor raised RuntimeError: lost" in str(request.error)
    assert {s.finish_reason for s in request.sequences} == {"error"}
    assert other.error is None and other.sequences[0].num_output_tokens == 8
    nothing_left(engine)


def test_a_processor_that_leaves_no_number_ends_its_own_request():
    engine = tiny_engine()
    spoil = Processor(lambda tokens, logits: logits.fill_(float("nan")))
    request = engine.add(PROMPT, greedy(4, logits_processors=[spoil]))
    other = engine.add(PROMPT, greedy(4))
    finish(engine)
    assert "not a number" in str(request.error) and other.error is None
    nothing_left(engine)


def test_the_eager_model_marks_logits_that_are_not_finite():
    rows = torch.tensor([[1.0, 3.0, 3.0], [float("nan")] * 3, [1.0, float("inf"), 2.0]])
    assert _best_tokens(rows) == [1, -1, -1]
