"""Beam search: the sequences of transformers, in shared blocks that all come back."""

import pytest
import torch
import transformers

from harness.families import decoder_of, spread
from harness.tiny_engine import engine_of, finish, greedy, nothing_left
from harness.tiny_model import random_tokens
from kvloom.attention.reference import ReferenceBackend
from kvloom.engine.beam import BeamSearchParams
from kvloom.engine.params import SamplingParams
from kvloom.errors import InvalidInputError
from kvloom.models.eager import EagerModel

EOS = 2
CONFIG = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": EOS,
    "pad_token_id": 0,
}  # fmt: skip
PROMPTS = [random_tokens(length, 40, seed) for seed, length in enumerate((5, 33, 18))]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return (model of transformers, decoder) with the same random weights."""
    oracle = spread(transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG)).eval())
    return oracle, decoder_of(oracle, tmp_path_factory.mktemp("model"))


def beam_engine(decoder, *, max_num_seqs=16, eos=(EOS,)):
    """Return an engine in float32 with room for all beams."""
    model = EagerModel(decoder, ReferenceBackend())
    return engine_of(model, max_num_seqs=max_num_seqs, block_size=4, max_model_len=256, eos=eos)


def of_transformers(oracle, prompt, params):
    """Return (sequences, scores) of the model of transformers."""
    out = oracle.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        num_beams=params.beam_width,
        num_return_sequences=params.beam_width,
        max_new_tokens=params.max_tokens,
        length_penalty=params.length_penalty,
        early_stopping=params.early_stopping,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
    )
    rows = []
    for row in out.sequences[:, len(prompt) :].tolist():
        rows.append(row[: row.index(EOS) + 1] if EOS in row else row)
    return rows, out.sequences_scores.tolist()


@pytest.mark.parametrize(("penalty", "early"), [(1.0, False), (0.0, False), (2.0, False), (-1.0, False), (1.0, True)])
def test_beams_are_those_of_transformers(models, penalty, early):
    oracle, decoder = models
    params = BeamSearchParams(4, 24, length_penalty=penalty, early_stopping=early)
    engine = beam_engine(decoder)
    requests = [engine.add_beam_search(prompt, params) for prompt in PROMPTS]
    finish(engine)
    ended = 0
    for prompt, request in zip(PROMPTS, requests, strict=True):
        expected, scores = of_transformers(oracle, prompt, params)
        outputs = engine.output(request).outputs
        assert [output.token_ids for output in outputs] == expected
        ended += sum(output.finish_reason == "stop" for output in outputs)
        for output, score in zip(outputs, scores, strict=True):
            found = output.cumulative_logprob / len(output.token_ids) ** penalty
            assert found == pytest.approx(score, rel=1e-5, abs=1e-4)
    assert ended > 0, "no beam ended by itself: the test would be too easy"
    nothing_left(engine)


def test_four_beams_hold_far_fewer_blocks_than_four_copies(models):
    engine = beam_engine(models[1], eos=())
    request = engine.add_beam_search(PROMPTS[1], BeamSearchParams(4, 20))
    most = copies = 0
    while engine.has_work:
        engine.step()
        most = max(most, engine.cache.bytes_in_use)
        rows = [sequence.row for sequence in request.sequences if sequence.row is not None]
        copies = max(copies, sum(engine.cache.lanes.sequence_bytes(row) for row in rows))
        engine.cache.check_invariants()
    assert len(request.sequences) == 4 and most < 0.6 * copies
    nothing_left(engine)


def test_an_aborted_search_leaves_nothing_behind(models):
    engine = beam_engine(models[1])
    request = engine.add_beam_search(PROMPTS[1], BeamSearchParams(4, 24))
    for _ in range(6):
        engine.step()
    engine.abort(request.request_id)
    nothing_left(engine)


def test_the_best_n_are_returned_best_first(models):
    engine = beam_engine(models[1])
    every = engine.add_beam_search(PROMPTS[2], BeamSearchParams(4, 12))
    two = engine.add_beam_search(PROMPTS[2], BeamSearchParams(4, 12, n=2))
    finish(engine)
    found = [s.output_token_ids for s in every.sequences]
    assert [s.output_token_ids for s in two.sequences] == found[:2]


def test_other_requests_beside_a_search_are_not_changed_by_it(models):
    alone = beam_engine(models[1])
    expected = alone.add(PROMPTS[0], greedy(12))
    finish(alone)
    engine = beam_engine(models[1])
    request = engine.add(PROMPTS[0], greedy(12))
    engine.add_beam_search(PROMPTS[1], BeamSearchParams(4, 12))
    finish(engine)
    assert request.sequences[0].output_token_ids == expected.sequences[0].output_token_ids


def test_beams_that_are_preempted_find_the_same_sequences(models):
    params = BeamSearchParams(4, 40)
    roomy = beam_engine(models[1], eos=())
    expected = roomy.add_beam_search(PROMPTS[1], params)
    finish(roomy)
    tight = beam_engine(models[1], eos=(), max_num_seqs=5)
    request = tight.add_beam_search(PROMPTS[1], params)
    steps = 0
    while tight.has_work:
        steps += 1
        tight.step()
        victims = [s for s in tight.scheduler.running if s.request is request and request.forked]
        if steps % 3 == 0 and len(victims) > 1:
            tight.scheduler.queues.preempt(victims[-1])  # as when blocks are short
        if steps % 5 == 0 and len(victims) > 2:
            idle = [s for s in victims[:-1] if not tight.scheduler.capacity.pending_tokens(s)]
            if idle:
                tight.scheduler.queues.park(idle[0])
        assert steps < 2000
    assert [s.output_token_ids for s in request.sequences] == [s.output_token_ids for s in expected.sequences]
    assert tight.scheduler.num_preemptions > 5
    nothing_left(tight)


def test_log_probabilities_of_a_beam_sum_to_its_own_and_have_the_best_tokens(models):
    engine = beam_engine(models[1])
    plain = engine.add_beam_search(PROMPTS[0], BeamSearchParams(beam_width=4, max_tokens=10))
    finish(engine)
    request = engine.add_beam_search(PROMPTS[0], BeamSearchParams(beam_width=4, max_tokens=10, logprobs=5))
    finish(engine)
    for output, same in zip(engine.output(request).outputs, engine.output(plain).outputs, strict=True):
        assert output.token_ids == same.token_ids and same.logprobs is None
        entries = output.logprobs
        assert len(entries) == len(output.token_ids) and all(5 <= len(entry) <= 6 for entry in entries)
        own = [entry[token] for entry, token in zip(entries, output.token_ids, strict=True)]
        assert sum(found.logprob for found in own) == pytest.approx(output.cumulative_logprob, abs=1e-4)
        for entry in entries:
            ranked = sorted(entry.values(), key=lambda found: found.rank)
            assert [found.logprob for found in ranked] == sorted((f.logprob for f in ranked), reverse=True)
        # the same prompt and answer, forced token by token, has the same log-probabilities
        params = SamplingParams(max_tokens=64, logprobs=1, temperature=0)
        forced = engine.add(PROMPTS[0], params, forced_token_ids=output.token_ids)
        finish(engine)
        for token, entry, found in zip(output.token_ids, engine.output(forced).outputs[0].logprobs, own, strict=True):
            assert entry[token].logprob == pytest.approx(found.logprob, abs=1e-4) and entry[token].rank == found.rank
    nothing_left(engine)


def test_a_stop_token_finishes_a_beam_and_is_named(models):
    engine = beam_engine(models[1])
    first = engine.add_beam_search(PROMPTS[0], BeamSearchParams(max_tokens=8, ignore_eos=True, length_penalty=0.0))
    finish(engine)
    token = first.sequences[0].output_token_ids[3]
    params = BeamSearchParams(max_tokens=8, ignore_eos=True, length_penalty=0.0, stop_token_ids=[token])
    request = engine.add_beam_search(PROMPTS[0], params)
    finish(engine)
    ended = [s for s in request.sequences if s.finish_reason == "stop"]
    assert ended and all(s.output_token_ids[-1] == s.stop_reason == token for s in ended)
    assert all(token not in s.output_token_ids[:-1] for s in request.sequences)
    nothing_left(engine)


def test_what_beams_cannot_do_is_refused(models):
    engine = beam_engine(models[1])
    for wrong in (
        {"beam_width": 1}, {"max_tokens": 0}, {"n": 5}, {"length_penalty": "long"}, {"stop": ["x"]}, {"logprobs": -1},
        {"stop_token_ids": [-1]},
    ):  # fmt: skip
        with pytest.raises(InvalidInputError, match=next(iter(wrong))):
            BeamSearchParams(**wrong)
    assert not engine.has_work
