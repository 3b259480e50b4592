"""Admission: whether a request can run on this engine, and how many tokens it may generate."""

from collections.abc import Sequence as Seq

from kvloom.engine.capacity import Capacity
from kvloom.engine.kvpolicies import KVPolicies
from kvloom.engine.logits_processors import ProcessorFactory
from kvloom.engine.params import SamplingParams
from kvloom.errors import InvalidInputError
from kvloom.policies.policy import Policy
from kvloom.spec.policy import PolicySpec

UNBOUNDED_TOKENS = 1 << 31
"""Most tokens of a request whose positions are counted in the cache, so that no context length limits it."""


class Admission:
    """Checks requests; changes nothing and may be called from any thread."""

    def __init__(
        self,
        policies: KVPolicies,
        processors: ProcessorFactory,
        capacity: Capacity,
        *,
        vocab_size: int,
        max_num_seqs: int,
        max_model_len: int,
        max_position: int,
    ) -> None:
        """Admit requests of up to `max_model_len` tokens; under a policy that evicts, of up to `max_position`."""
        self.policies = policies
        self.processors = processors
        self.capacity = capacity
        self.vocab_size = vocab_size
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len
        self.max_position = max_position

    def check_request(
        self, prompt: Seq[int], params: SamplingParams, forced: Seq[int] | None, kv_policy: PolicySpec | None
    ) -> int:
        """Return how many tokens such a request may generate.

        Raises `InvalidInputError` for wrong ids and lengths, `UnsupportedError` with every reason why the policy cannot
        run, and `DoesNotFitError` when the request could not run even alone.
        """
        spec = self.policies.policy_for(kv_policy)
        self._check_ids(prompt, params, forced)
        max_tokens = self._max_tokens(prompt, params, forced, Policy.of(spec))
        self.processors.processors(params)
        if params.n > self.max_num_seqs:
            raise InvalidInputError(f"n is {params.n}, above max_num_seqs, which is {self.max_num_seqs}")
        self.policies.check_policy(spec, prompt, len(prompt) + max_tokens, params.n)
        return max_tokens

    @staticmethod
    def check_options(request_id: str | None, cache_salt: str, priority: int) -> None:
        """Raise `InvalidInputError` for an option of a request that is of the wrong type."""
        for option, value, kind in (
            ("request_id", "" if request_id is None else request_id, str),
            ("cache_salt", cache_salt, str),
            ("priority", priority, int),
        ):
            if not isinstance(value, kind) or isinstance(value, bool):
                raise InvalidInputError(f"{option} must be {kind.__name__}, not {value!r}")

    def _check_ids(self, prompt: Seq[int], params: SamplingParams, forced: Seq[int] | None) -> None:
        if not len(prompt):
            raise InvalidInputError("the prompt is empty; give at least one token")
        vocab = self.vocab_size
        for token in (*prompt, *(forced or ()), *params.logit_bias, *params.stop_token_ids):
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab:
                raise InvalidInputError(f"{token!r} is not a token id; this model has ids 0 to {vocab - 1}")

    def _max_tokens(
        self, prompt: Seq[int], params: SamplingParams, forced: Seq[int] | None, policy: Policy | None
    ) -> int:
        longest = self.max_model_len if policy is None else self.max_position
        room = longest - len(prompt)
        if policy is not None and policy.spec.moved_sinks is not None:
            room = UNBOUNDED_TOKENS  # positions are counted in the cache: text is unbounded
        if room < 1:
            raise InvalidInputError(
                f"the prompt has {len(prompt)} tokens; the model's length is {longest} and at least one "
                "token is generated. Shorten the prompt or raise --max-model-len"
            )
        if forced is not None:
            if not 0 < len(forced) <= room or params.n != 1:
                raise InvalidInputError(f"a forced continuation has 1 to {room} tokens here and n=1")
            return len(forced)
        if params.max_tokens is None and room == UNBOUNDED_TOKENS:
            raise InvalidInputError("a request with positions=cache has no end of its own; give max_tokens")
        return room if params.max_tokens is None else min(params.max_tokens, room)
