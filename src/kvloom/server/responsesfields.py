"""Body of /v1/responses: every field that it may have."""

from kvloom.server.bodies import MAX_MESSAGES, SAMPLING
from kvloom.server.fields import Field, refused, table, unneeded, warned
from kvloom.server.values import AnyOf, Anything, Boolean, Integer, ListOf, Object, Tagged, Text, Verbatim

EXTRAS = (
    "top_k", "min_p", "seed", "min_tokens", "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos",
    "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "bad_words", "allowed_token_ids",
    "skip_special_tokens", "truncate_prompt_tokens", "cache_salt", "priority", "request_id", "kv_policy", "vllm_xargs",
)  # fmt: skip
"""Fields beyond other APIs' own, with the names and meanings that they have in /v1/chat/completions."""

OUTPUT_TEXT = Object({"text": Text(), "annotations": Anything(), "logprobs": Anything()}, required=("text",))
PART = Tagged(
    "type",
    {
        "input_text": Object({"text": Text(), "prompt_cache_breakpoint": Anything()}, required=("text",)),
        "output_text": OUTPUT_TEXT,
        "text": Object({"text": Text()}, required=("text",)),
        "refusal": Object({"refusal": Text()}, required=("refusal",)),
    },
)
TEXTS = AnyOf((Text(), ListOf(PART)))
KEPT = {"id": Text(), "status": Text()}
"""Entries of items that clients send back as they got them."""

ITEM = Tagged(
    "type",
    {
        "message": Object(
            {"role": Text(least=1, most=64), "content": TEXTS, "phase": Text(), **KEPT}, required=("role", "content")
        ),
        "function_call": Object(
            {"call_id": Text(), "name": Text(least=1), "arguments": Text(), **KEPT},
            required=("call_id", "name", "arguments"),
        ),
        "function_call_output": Object(
            {"call_id": Text(), "output": TEXTS, "name": Text(), **KEPT}, required=("call_id", "output")
        ),
        "reasoning": Object(),
        "item_reference": Object({"id": Text()}),
    },
    default="message",
)
TOOL = Tagged(
    "type",
    {
        "function": Object(
            {
                "name": Text(least=1),
                "description": Text(),
                "parameters": Verbatim(),
                "strict": Boolean(),
                "output_schema": Anything(),
                "defer_loading": Anything(),
            },
            required=("name",),
        )
    },
)
TOOL_CHOICE = AnyOf(
    (
        Text(choices=("auto", "none", "required")),
        Object({"type": Text(choices=("function",)), "name": Text(least=1)}, required=("type", "name")),
    )
)
FORMAT = Tagged(
    "type",
    {
        "text": Object({}),
        "json_object": Object({}),
        "json_schema": Object(
            {"name": Text(), "schema": Verbatim(), "strict": Boolean(), "description": Text()}, required=("schema",)
        ),
    },
)

RESPONSES = {
    **table(*(SAMPLING[name] for name in ("model", "temperature", "top_p", "stream", *EXTRAS))),
    **table(
        Field(
            "input",
            AnyOf((Text(), ListOf(ITEM, MAX_MESSAGES, 1))),
            "The conversation: text, or messages, calls of functions and what these returned.",
            required=True,
        ),
        Field("instructions", Text(), "What a system message before everything says."),
        Field("max_output_tokens", Integer(1), "Most tokens of the answer."),
        Field("tools", ListOf(TOOL, 128), "Functions that the model may call."),
        Field("tool_choice", TOOL_CHOICE, "`auto`, `none`, `required`, or one function."),
        Field("parallel_tool_calls", Boolean(), "false keeps only the first call."),
        Field("text", Object({"format": FORMAT, "verbosity": Text()}), "`format`: a form that the answer follows."),
        Field(
            "reasoning",
            Object({"effort": Text(64), "summary": Text(), "generate_summary": Text()}),
            "`effort` is a variable of templates that have it.",
        ),
        Field("stream_options", Object({"include_obfuscation": Boolean()}), "Nothing is obfuscated."),
        Field("include", ListOf(Text()), "Further parts of the answer; none is made here."),
        Field("metadata", Object(), "The caller's own notes; the answer repeats them."),
        Field("store", Boolean(), "Nothing is kept: false is what happens."),
        unneeded("user", "The caller's name for its user."),
        unneeded("safety_identifier", "The caller's name for its user."),
        unneeded("service_tier", "A hosted service's price class."),
        unneeded("max_tool_calls", "A limit of the tools that a hosted service runs; none run here."),
        warned("prompt_cache_key", "A hosted service's routing hint; use `cache_salt` to separate caches."),
        warned("prompt_cache_retention", "How long a hosted service keeps prefixes."),
        warned("prompt_cache_options", "How a hosted service keeps prefixes."),
        refused("background", "Answers that are fetched later.", False),
        refused(
            "previous_response_id", "No answer is kept, so none can be continued: send the whole conversation as input."
        ),
        refused("conversation", "No conversation is kept: send the whole of it as input."),
        refused("prompt", "Prompts that a hosted service keeps."),
        refused("context_management", "Shortening the conversation.", []),
        refused("truncation", "Dropping items of the conversation.", "disabled"),
        refused("top_logprobs", "Log-probabilities; /v1/chat/completions has them.", 0),
        refused("moderation", "Judging the conversation."),
    ),
}
"""Body of /v1/responses."""
