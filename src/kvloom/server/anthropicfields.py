"""Bodies of Anthropic's /v1/messages: every field that they may have."""

from kvloom.engine.params import MAX_STOP_STRINGS
from kvloom.server.bodies import MAX_MESSAGES, MAX_STOP_CHARS, SAMPLING
from kvloom.server.fields import Field, refused, table, unneeded, warned
from kvloom.server.values import AnyOf, Anything, Boolean, Integer, ListOf, Object, Tagged, Text, Verbatim

EXTRAS = (
    "top_k", "min_p", "seed", "min_tokens", "stop_token_ids", "include_stop_str_in_output", "ignore_eos",
    "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "bad_words", "allowed_token_ids",
    "skip_special_tokens", "truncate_prompt_tokens", "cache_salt", "priority", "request_id", "kv_policy", "vllm_xargs",
)  # fmt: skip
"""Fields beyond this API's own, with the names and meanings that they have in /v1/chat/completions."""

HINT = {"cache_control": Anything()}
"""A hint to a hosted service's cache; prefixes are cached here without it."""

TEXT = Object({"text": Text(), "citations": Anything(), **HINT}, required=("text",))
TEXTS = AnyOf((Text(), ListOf(Tagged("type", {"text": TEXT}))))
BLOCK = Tagged(
    "type",
    {
        "text": TEXT,
        "tool_use": Object(
            {"id": Text(), "name": Text(least=1), "input": Verbatim(), "caller": Anything(), **HINT},
            required=("id", "name", "input"),
        ),
        "tool_result": Object(
            {"tool_use_id": Text(), "content": TEXTS, "is_error": Boolean(), **HINT}, required=("tool_use_id",)
        ),
        "thinking": Object(),
        "redacted_thinking": Object(),
    },
)
MESSAGE = Object(
    {"role": Text(choices=("user", "assistant", "system")), "content": AnyOf((Text(), ListOf(BLOCK)))},
    required=("role", "content"),
)
TOOL = Tagged(
    "type",
    {
        "custom": Object(
            {
                "name": Text(least=1),
                "description": Text(),
                "input_schema": Verbatim(),
                "strict": Boolean(),
                "eager_input_streaming": Anything(),
                "input_examples": Anything(),
                **HINT,
            },
            required=("name", "input_schema"),
        )
    },
    default="custom",
)
SINGLE = {"disable_parallel_tool_use": Boolean()}
TOOL_CHOICE = Tagged(
    "type",
    {
        "auto": Object(SINGLE),
        "any": Object(SINGLE),
        "tool": Object({"name": Text(least=1), **SINGLE}, required=("name",)),
        "none": Object({}),
    },
)
FORMAT = Tagged("type", {"json_schema": Object({"schema": Verbatim()}, required=("schema",))})

PROMPT = table(
    SAMPLING["model"],
    Field("messages", ListOf(MESSAGE, MAX_MESSAGES, 1), "The conversation, in order.", required=True),
    Field("system", TEXTS, "What a system message before everything says."),
    Field("tools", ListOf(TOOL, 128), "Functions that the model may call."),
    Field("tool_choice", TOOL_CHOICE, "`auto`, `any`, `none`, or one function as `tool`."),
    Field(
        "output_config",
        Object({"format": FORMAT, "effort": Text(64)}),
        "`format`: a form that the answer follows; `effort` is a variable of templates that have it.",
    ),
    warned("thinking", "Reasoning before the answer; models reason as their template has it.", {"type": "disabled"}),
    warned("speed", "How fast a hosted service answers.", "standard"),
    unneeded("cache_control", "A hint to a hosted service's cache; prefixes are cached here without it."),
)
"""Fields that make the prompt."""

COUNT_TOKENS = PROMPT
"""Body of /v1/messages/count_tokens."""

MESSAGES = {
    **PROMPT,
    **table(*(SAMPLING[name] for name in ("temperature", "top_p", "stream", *EXTRAS))),
    **table(
        Field("max_tokens", Integer(1), "Most tokens of the answer.", required=True),
        Field(
            "stop_sequences",
            ListOf(Text(MAX_STOP_CHARS, 1), MAX_STOP_STRINGS),
            "End the answer before any of these texts.",
        ),
        unneeded("metadata", "The caller's name for its user."),
        unneeded("service_tier", "A hosted service's price class."),
        unneeded("inference_geo", "Where a hosted service computes."),
        warned("diagnostics", "Why a hosted service's cache was not used."),
        refused("container", "Running code."),
        refused("mcp_servers", "Tools that a hosted service calls.", []),
        refused("context_management", "Shortening the conversation."),
    ),
}
"""Body of /v1/messages."""
